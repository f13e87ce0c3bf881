"""The parts that touch the world: threads, process groups, stores, buffers, devices, the clock.

This package file imports nothing, so that the planner's child process starts without torch.
"""
