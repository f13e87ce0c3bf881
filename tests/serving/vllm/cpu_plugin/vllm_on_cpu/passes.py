"""The record of every rank's forward passes and of the faults among them.

VLLM_ON_CPU_PASSES names a folder. Each rank appends a line to its own file there as a pass begins and as a fault
strikes, so that a test can count what a rank did between the two, also of a rank that did not live to tell.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

_VARIABLE = "VLLM_ON_CPU_PASSES"


def apply() -> None:
    """Record passes where a folder is named."""
    if os.environ.get(_VARIABLE):
        before_each_pass(lambda _: note("pass"))


def note(word: str) -> None:
    """Append a line to the file of this rank; it is with the kernel when this returns."""
    folder = os.environ.get(_VARIABLE)
    if folder:
        with (Path(folder) / f"rank-{rank()}").open("a") as file:
            file.write(f"{word}\n")


def before_each_pass(action: Callable[[Any], None]) -> None:
    """Have every model call `action` with its runner whenever a forward pass begins."""
    load_model = CPUModelRunner.load_model

    def load_hooked_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        self.model.register_forward_pre_hook(lambda *_: action(self))

    CPUModelRunner.load_model = load_hooked_model


def rank() -> int:
    """This worker among those that share the experts: all of them share every batch, too."""
    number: int = get_tp_group().rank_in_group
    return number
