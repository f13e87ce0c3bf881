"""The protocol, pure: no torch, no threads, no clock, no logging, no I/O.

One method of :class:`~eplb_fsm.core.rank.RankCore` is one action of the spec.
"""
