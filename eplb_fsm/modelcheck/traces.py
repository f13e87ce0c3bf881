"""Asks TLC whether recorded runs are runs of the specification: many of them in one run of TLC."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eplb_fsm.errors import EplbError
from eplb_fsm.modelcheck.encoding import RunEncoder, to_tla
from eplb_fsm.modelcheck.recorded import Recorded, RecordedRun
from eplb_fsm.modelcheck.tlc import Tlc
from eplb_fsm.modelcheck.values import Value, parse_value

_MODULE = "RecordedRuns"
_OVERRIDES = {
    "Setup": "NoSetup",
    "Successor": "RunSuccessor",
    **{name: f"Run{name}" for name in ("Lag", "NumBuffers", "IdleInterval", "DrainDeadline")},
    **{name: f"Run{name}" for name in ("ChunksOf", "IsSkip", "DeadlineIn")},
}
_VERDICT = re.compile(r'<<\s*"verdict".*?(?=^<<\s*"verdict"|^@!@!@|\Z)', re.MULTILINE | re.DOTALL)


class Rejection(NamedTuple):
    """The first event of a run that the specification does not allow.

    Attributes:
        rank: Whose it is.
        event: The event.
        why: In a sentence.
        before: The core of the rank before it, as in the specification.
    """

    rank: int
    event: Recorded
    why: str
    before: Mapping[Any, Value]


class TraceResult(NamedTuple):
    """What TLC said of one run: accepted if there is neither a rejection nor a broken property."""

    run: RecordedRun
    rejection: Rejection | None
    broken: str
    """The property that a state of the run breaks; empty if none."""

    @property
    def is_accepted(self) -> bool:
        """Whether the run is one of the specification, and no state of it breaks a property."""
        return self.rejection is None and not self.broken


def check_runs(tlc: Tlc, spec: Path, runs: Sequence[RecordedRun]) -> list[TraceResult]:
    """Check recorded runs; blocks until TLC has ended.

    Args:
        tlc: What to run.
        spec: The folder of `Traces.tla`.
        runs: What was recorded.

    Raises:
        ConfigError: A run cannot be checked: an event lacks a word, or the ranks did not start alike.
        EplbError: TLC failed; with its last words.
    """
    with tempfile.TemporaryDirectory(prefix="traces-") as folder:
        module = Path(folder, f"{_MODULE}.tla")
        module.write_text("\n".join(_module_lines(runs)), encoding="utf-8")
        cfg = Path(folder, f"{_MODULE}.cfg")
        overrides = "".join(f"CONSTANT {name} <- {other}\n" for name, other in _OVERRIDES.items())
        cfg.write_text(f"SPECIFICATION Spec\n{overrides}", encoding="utf-8")
        output, message = tlc.evaluate(module, cfg, library=spec)
    verdicts = dict(_verdicts(output))
    if len(verdicts) != len(runs):
        raise EplbError(f"TLC judged {len(verdicts)} of {len(runs)} runs and failed: {message}")
    return [_result(run, verdicts[number]) for number, run in enumerate(runs, 1)]


def _module_lines(runs: Sequence[RecordedRun]) -> Iterator[str]:
    yield f"---- MODULE {_MODULE} ----"
    yield "EXTENDS Traces"
    yield "NoSetup == [lag |-> 0, backoff |-> 0]"
    names: dict[str, str] = {}  # runs that differ little share most of their events, and TLC takes long to read
    for number, run in enumerate(runs, 1):
        encoded = RunEncoder(run).encode()
        sequences = []
        for events in encoded.pop("events"):
            texts = [to_tla(event) for event in events]
            for text in texts:
                if text not in names:
                    names[text] = f"e{len(names)}"
                    yield f"{names[text]} == {text}"
            sequences.append("<<" + ", ".join(names[text] for text in texts) + ">>")
        yield f"Run{number} == {to_tla(encoded)} @@ [events |-> <<\n" + ",\n".join(sequences) + ">>]"
    yield f"ASSUME TLCSet(1, <<{', '.join(f'Run{number}' for number in range(1, len(runs) + 1))}>>)"
    yield "===="


def _verdicts(output: str) -> Iterator[tuple[int, tuple[Value, ...]]]:
    for match in _VERDICT.finditer(output):
        words = parse_value(match[0])
        assert isinstance(words, tuple)
        number, *rest = words[1:]
        assert isinstance(number, int)
        yield number, tuple(rest)


def _result(run: RecordedRun, words: tuple[Value, ...]) -> TraceResult:
    kind: Any = words[0]
    if kind == "accepted":
        return TraceResult(run, None, "")
    found: Any = words[1]
    if kind == "breaks":
        return TraceResult(run, None, found)
    # Who only waits for a vote is not to blame, unless nobody else is: then the vote is missing.
    first = min(found, key=lambda stuck: (stuck["waits"], stuck["rank"]))
    event = run.events[first["rank"]][first["index"] - 1]
    return TraceResult(run, Rejection(first["rank"], event, _why(run, event, first), first["core"]), "")


def _why(run: RecordedRun, event: Recorded, stuck: Mapping[Any, Any]) -> str:
    if stuck["waits"]:
        return "it needs a vote, or a word over the store, that no rank recorded"
    if not stuck["is_up"]:
        return "the rank had closed, or was not to serve on"
    if not stuck["is_time"]:
        return "a round was due before it, and was neither posted nor read"
    if not stuck["may"]:
        return "in this state, with these votes, the specification does not allow it"
    told = RunEncoder(run).projected(event)
    differences = [
        f"{name} should be {_word(gives)}, is {_word(told[name])}"
        for name, gives in stuck["gives"].items()
        if name != "live" and gives != told[name]
    ]
    return "; ".join(differences) or "the placement after it should be another one"


def _word(value: object) -> str:
    return "nothing" if value == "" else str(value)
