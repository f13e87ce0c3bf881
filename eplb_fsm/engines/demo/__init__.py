"""The demo: the same requests decoded without rebalancing, with sync and with async, and compared."""
