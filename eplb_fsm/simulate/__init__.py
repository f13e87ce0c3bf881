"""A whole domain in one process: the same core and the same RebalanceFSM under a seeded scheduler.

What is simulated is only what lies outside: channel, transport, store, device and clock.
"""
