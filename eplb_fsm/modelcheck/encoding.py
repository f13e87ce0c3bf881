"""Recorded runs as constants of `spec/Traces.tla`.

TLC has integers of 32 bits, so digests become small numbers and names in the order in which they are met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from eplb_fsm.core.reasons import decode_reason
from eplb_fsm.errors import ConfigError
from eplb_fsm.modelcheck.recorded import Recorded, RecordedRun
from eplb_fsm.observe.trace import SCHEMA_VERSION

_UNKNOWN = -1
"""A placement that no rank recorded, and a reason that another rank would have to give."""
_WORDS = {"GiveUp": "reason", "WorkFailed": "reason", "FailStop": "cause"}
"""What one word of these events says."""


def to_tla(value: object) -> str:
    """Return a value as TLA+ writes it: booleans, whole numbers, strings, sequences and records."""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, Mapping):
        return "[" + ", ".join(f"{name} |-> {to_tla(it)}" for name, it in value.items()) + "]" if value else "<<>>"
    if isinstance(value, Iterable):
        return "<<" + ", ".join(map(to_tla, value)) + ">>"
    raise TypeError(f"{value!r} has no counterpart in TLA+")


class _Digests:
    """Numbers digests in the order in which they are met."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}

    def number(self, digest: object) -> int:
        """Return the number of a digest."""
        return self._numbers.setdefault(digest, len(self._numbers))


class RunEncoder:
    """Encodes one run.

    Args:
        run: The run.

    Raises:
        ConfigError: An event lacks a word, or the ranks did not start alike.
    """

    def __init__(self, run: RecordedRun) -> None:
        self._run = run
        self._lives = _Digests()
        self._plan_numbers = _Digests()
        self._plans: dict[str, dict[str, Any]] = {}
        self._epoch_plan = ""

    def encode(self) -> dict[str, Any]:
        """Return the run as a record of `Runs`."""
        init = self._init()
        events = [[self._event(rank, event) for event in own] for rank, own in enumerate(self._run.events)]
        deadlines = ("COLLECTING", "COMPUTING", "AWAITING_CONSENSUS")
        return {
            "idle_interval": init["idle_interval"],
            "drain_deadline": init["drain_deadline_steps"],
            "deadline": {state: init[f"{state.lower()}_deadline_steps"] for state in deadlines},
            "backoff": init["backoff_steps"],
            "max_backoff": init["max_backoff_steps"],
            "cooldown": init["cooldown_steps"],
            "lag": init["lag"],
            "num_buffers": init["staging_buffers"],
            "live": self._lives.number(self._run.events[0][0].words["live_digest"]),
            "has_pass_ids": any(e.detail.get("pass_id") for own in self._run.events for e in own),
            "plans": {
                name: {**plan, "lives": plan["lives"] + [_UNKNOWN] * (plan["num_chunks"] - len(plan["lives"]))}
                for name, plan in self._plans.items()
            },
            "events": events,
        }

    def _init(self) -> Mapping[str, Any]:
        firsts = [own[0] if own else None for own in self._run.events]
        for rank, first in enumerate(firsts):
            if first is None or first.action != "Init":
                raise ConfigError(f"{self._run.files[rank]} does not begin with Init: the rank was never armed")
        details = [first.detail for first in firsts if first is not None]
        for rank, detail in enumerate(details):
            for word, value in detail.items():
                if details[0].get(word) != value:
                    raise ConfigError(
                        f"{self._run.files[rank]}: rank {rank} was started with {word} = {value}, "
                        f"rank 0 with {details[0].get(word)}"
                    )
        return details[0]

    def _event(self, rank: int, event: Recorded) -> list[Any]:
        try:
            return [event.action, event.step, *self.projected(event).values(), *self._argument(rank, event)]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self._run.files[rank]}, line {event.line} is no event of schema {SCHEMA_VERSION}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def projected(self, event: Recorded) -> dict[str, Any]:
        """Return the state of its rank that an event says; the placement as a number of this encoder."""
        words = event.words
        return {
            "state": words["state"],
            "epoch": words["epoch"],
            "round": words["round_idx"],
            "chunk": words["chunk_idx"],
            "staged": words["num_staged"],
            "drained": words["is_drained"],
            "frozen": words["is_frozen"],
            "live": self._lives.number(words["live_digest"]),
            "outcome": event.detail.get("outcome", ""),
        }

    def _argument(self, rank: int, event: Recorded) -> list[Any]:
        encoders: dict[str, Callable[[int, Recorded], list[Any]]] = {
            "PostVote": self._vote,
            "ReadRound": self._decision,
            "ResolveRound": self._decision,
            "PlanReady": self._plan,
            "ChunkStaged": self._staged,
            "CommitChunk": self._commit,
        }
        if event.action in encoders:
            return encoders[event.action](rank, event)
        return [event.detail[_WORDS[event.action]]] if event.action in _WORDS else []

    def _vote(self, rank: int, event: Recorded) -> list[Any]:
        detail = event.detail
        reasons = (_own_reason(rank, detail[word]) for word in ("abort", "stop"))
        wishes = (bool(detail[word]) for word in ("request", "freeze"))
        return [
            *(detail["pass_id"], detail["lag"], detail["progress"]),
            *(*reasons, *wishes, detail["earliest_next_step"]),
        ]

    def _decision(self, rank: int, event: Recorded) -> list[Any]:
        detail = event.detail
        decision = [detail["decision"], detail["reason"] or "none", detail["num_chunks"]]
        return [*decision, detail["earliest_next_step"], detail["lost"]]

    def _commit(self, rank: int, event: Recorded) -> list[Any]:
        return [event.detail["chunk"], event.detail["earliest_next_step"]]

    def _plan(self, rank: int, event: Recorded) -> list[Any]:
        detail = event.detail
        name = f"p{self._plan_numbers.number(detail['plan_digest'])}"
        terms = {
            "num_chunks": detail["num_chunks"],
            "is_skip": detail["skip"],
            "deadline": detail["deadline_steps"],
        }
        self._plans.setdefault(name, {**terms, "lives": []})
        self._epoch_plan = name
        return [name, *terms.values()]

    def _staged(self, rank: int, event: Recorded) -> list[Any]:
        """What the placement will be; the first rank that says so is believed, the others must say the same."""
        live = self._lives.number(event.detail["digest"])
        lives = self._plans[self._epoch_plan]["lives"] if self._epoch_plan else []
        if len(lives) == event.words["num_staged"] - 1:
            lives.append(live)
        return [live]


def _own_reason(rank: int, word: int) -> int:
    """Return the code of a reason that a rank votes; only its own name may stand beside it."""
    code, named = decode_reason(word)
    return code if named == rank or not word else _UNKNOWN
