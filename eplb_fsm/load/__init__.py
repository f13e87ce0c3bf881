"""Counting how many tokens go to each expert."""

from eplb_fsm.load.recorder import LoadRecorder, LoadSource

__all__ = ["LoadRecorder", "LoadSource"]
