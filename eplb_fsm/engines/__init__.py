"""Engines that embed the rebalance."""
