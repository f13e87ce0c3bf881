"""The configuration: one frozen dataclass, validated when it is made.

Names are vLLM's where the meaning is the same (``window_size``, ``step_interval``, ``num_redundant_experts``,
``policy``); ``docs/reference/options.md`` holds the table of equivalents.
"""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

from eplb_fsm.errors import ConfigError

ENV_PREFIX = "EPLB_FSM_"
MIB = 1 << 20
DEFAULT_TARGET_BALANCEDNESS = 0.95
DEFAULT_CROSS_NODE_PRICE = 2.0
"""Between links of one speed, where it costs up to a third more moves, and links that differ ninefold (an NVLink and a
network card of today), where most moves between nodes are saved and a higher price saves little more:
``python -m tests.benchmarks.nodes``."""
MAX_CROSS_NODE_PRICE = 1_000_000

_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("async", "sync"),
    "plan_source": ("lowest_rank", "every_rank"),
    "planner": ("process", "thread"),
    "replica_split": ("equal", "weighted"),
    "load_phases": ("together", "decode", "prefill"),
    "integrity": ("off", "wire", "slot"),
}
_AT_LEAST: dict[str, float] = {
    "window_size": 1,
    "step_interval": 0,
    "num_redundant_experts": 0,
    "num_nodes": 1,
    "num_groups": 1,
    "cross_node_price": 1,
    "idle_round_interval": 1,
    "staging_buffers": 1,
    "max_transfer_mb_s": 0,
    "max_epoch_bytes": 0,
    "max_slowdown": 0,
    "min_gain": 0,
    "trigger_balancedness": 0.01,
    "horizon_steps": 0,
    "moe_time_share": 0.01,
    "cooldown_steps": 0,
    "target_balancedness": 0.01,
    "collecting_deadline_steps": 1,
    "computing_deadline_steps": 1,
    "awaiting_consensus_deadline_steps": 1,
    "transfer_floor_bytes_per_step": 1,
    "transfer_slack_steps": 1,
    "drain_deadline_steps": 1,
    "backoff_steps": 1,
    "max_backoff_steps": 1,
}
_LARGEST = 1 << 40
"""Bound of every number: sums of them stay far inside the 64-bit words of a vote."""
_AT_MOST: dict[str, float] = {
    "cross_node_price": MAX_CROSS_NODE_PRICE,
    "staging_buffers": 64,
    "max_slowdown": 100,
    "trigger_balancedness": 1,
    "moe_time_share": 1,
    "target_balancedness": 1,
}
_OR_AUTO: dict[str, type] = {"lag": int, "load_decay": float, "commit_bytes": int}
"""Numbers in whose place "auto" may stand."""
_MAX_SECONDS = 1_000_000
_POSITIVE_SECONDS = (
    "vote_timeout_s",
    "resolve_timeout_s",
    "liveness_timeout_s",
    "start_timeout_s",
    "plan_timeout_s",
    "transfer_timeout_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceConfig:
    """What an operator may set; equal on all ranks of a domain, which the ranks check at start.

    Raises:
        ConfigError: At construction, naming the option, its value and the rule.
    """

    mode: Literal["async", "sync"] = "async"
    """``async``: background, agreed by lagged rounds. ``sync``: the same machine run through in one step()."""
    policy: str = "movement_aware"
    """Name of the policy that makes placements, built in or from the entry points ``eplb_fsm.policies``."""
    plan_source: Literal["lowest_rank", "every_rank"] = "lowest_rank"
    """Who computes the plan; ``every_rank`` needs a policy that declares itself deterministic."""
    planner: Literal["process", "thread"] = "process"
    """Where the policy runs: a child process leaves the interpreter lock of the decode loop alone."""
    step_interval: int = 3000
    """Steps between the starts of two epochs (vLLM's default); 0: only when some rank asks."""
    window_size: int = 1000
    """Steps of load that a plan is made from (vLLM's default), rounded up to whole idle rounds."""
    replica_split: Literal["equal", "weighted"] = "equal"
    """How an expert's tokens are divided among its replicas. ``weighted``: so that the heaviest rank is as light as the
    placement allows, by the last plan's load; then a layer moves only if that is not enough. On several nodes a rank
    takes the replicas of its own node first."""
    load_phases: Literal["together", "decode", "prefill"] = "together"
    """Which tokens count, where the engine says which are of prompts: all, or those of one phase."""
    load_decay: float | Literal["auto"] = "auto"
    """How much the load of earlier windows counts in a plan beside the last one, from 0 (nothing) to below 1, for each
    window between. ``auto``: whichever of 0, 0.5, 0.75 and 0.9 foretold the last windows most closely."""
    num_redundant_experts: int = 0
    """Physical experts beyond one for each logical expert."""
    num_nodes: int = 1
    """Nodes of the domain; ranks are numbered node by node."""
    num_groups: int = 1
    """Groups of logical experts that a hierarchical policy keeps on one node."""
    cross_node_price: float = DEFAULT_CROSS_NODE_PRICE
    """What an expert that comes from another node counts in the policy ``movement_aware``, in experts that come from
    the same one, and in whether a layer pays; 1: no more."""
    min_gain: float = 0.01
    """Smallest predicted rise of mean balancedness for which an epoch moves anything; else it is SKIPPED."""
    trigger_balancedness: float = 1.0
    """Mean balancedness from which on an epoch is SKIPPED, and the policy not asked; 1: never."""
    horizon_steps: int = 3000
    """Steps over which a layer must give back more time than moving its experts takes from the decode loop, by what the
    ranks measured; else it stays as it is, and the epoch is SKIPPED where none does. 0: layers need not pay."""
    moe_time_share: float = 0.5
    """Share of a step's time that goes to the experts, for ``horizon_steps``."""
    cooldown_steps: int = 0
    """Steps after an epoch has committed its last chunk in which none starts; a request waits until they are over."""
    target_balancedness: float = DEFAULT_TARGET_BALANCEDNESS
    """Balancedness at which the policy ``movement_aware`` leaves a layer as it is."""
    lag: int | Literal["auto"] = "auto"
    """Steps between posting and reading a round. ``auto``: 2 plus how far the host runs ahead of the device,
    raised while idle when more than 1 % of rounds are late."""
    idle_round_interval: int = 128
    """Most steps between rounds while idle; with a smaller ``step_interval`` that many. In an epoch that waits no more
    lie between the reading of a round and the next one."""
    commit_bytes: int | Literal["auto"] = "auto"
    """Most bytes of weights that one rank writes in one commit: it bounds the pause of that step. ``auto``: one expert,
    or as many as fit 4 MiB, on an accelerator 8 MiB."""
    staging_buffers: int = 4
    """Chunks that may be staged at a time, and so decided in one round; each costs ``commit_bytes`` to receive and as
    much to send. With more of them an epoch takes fewer steps, down to one for each chunk."""
    max_transfer_mb_s: float = 0.0
    """Most megabytes (10**6 bytes) a second that one rank sends in async mode; 0: no limit."""
    max_epoch_bytes: int = 0
    """Most bytes of weights that come from other ranks in one epoch, all ranks together; 0: no limit. The layers that
    gain most for each byte go first, the others wait for the next epoch."""
    max_slowdown: float = 0.03
    """In async mode staging pauses while the mean step is slower than before the epoch by more than this, and the
    pieces of planning are a step apart; 0: never, and they are not."""
    integrity: Literal["off", "wire", "slot"] = "wire"
    """``wire``: each moved expert carries a hash. ``slot``: committed rows are also read back and compared."""
    vote_timeout_s: float = 5.0
    """Longest wait for a round that is late."""
    resolve_timeout_s: float = 30.0
    """Longest wait for the resolution of a lost decision on a staged chunk, then fail-stop."""
    liveness_timeout_s: float = 60.0
    """A rank whose liveness mark has not moved for this long is reported lost."""
    start_timeout_s: float = 300.0
    """Longest wait for the other ranks at start, one of which may compile its planner for a minute."""
    plan_timeout_s: float = 60.0
    """Longest time that the policy may take."""
    transfer_timeout_s: float = 60.0
    """Longest time for one operation of the worker on the data group."""
    collecting_deadline_steps: int = 3000
    """Past it the rank votes to abort."""
    computing_deadline_steps: int = 6000
    """Past it the rank votes to abort."""
    awaiting_consensus_deadline_steps: int = 6000
    """Past it the rank votes to abort."""
    transfer_floor_bytes_per_step: int = 1 * MIB
    """TRANSFERRING's deadline: bytes of the busiest rank over this, plus ``transfer_slack_steps``."""
    transfer_slack_steps: int = 3000
    """Steps added to the deadline of TRANSFERRING."""
    drain_deadline_steps: int = 20000
    """Past it after an abort, with a transfer still under way, the rank votes to stop."""
    backoff_steps: int = 100
    """Steps before the next try after an abort; doubled with each further abort in a row."""
    max_backoff_steps: int = 10000
    """Bound of the doubling."""

    def __post_init__(self) -> None:
        """Validate every option on its own and those that depend on each other."""
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name))
            # 5 and 5.0 are one configuration, so they need one fingerprint.
            if self._is_float(field.name, field.default):
                object.__setattr__(self, field.name, _as_float(field.name, getattr(self, field.name)))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _error(name, getattr(self, name), f"must be one of {', '.join(choices)}")
        for name, smallest in _AT_LEAST.items():
            if not getattr(self, name) >= smallest:
                raise _error(name, getattr(self, name), f"must be at least {smallest}")
            largest = _AT_MOST.get(name, _LARGEST)
            if not getattr(self, name) <= largest:
                raise _error(name, getattr(self, name), f"must be at most {largest}")
        for name in _POSITIVE_SECONDS:
            if not 0 < getattr(self, name) <= _MAX_SECONDS:
                raise _error(name, getattr(self, name), f"must be a number of seconds above 0, at most {_MAX_SECONDS}")
        self._check_relations()

    def _is_float(self, name: str, default: object) -> bool:
        return isinstance(default, float) or (_OR_AUTO.get(name) is float and getattr(self, name) != "auto")

    def _check_relations(self) -> None:
        if self.lag != "auto" and not 1 <= self.lag <= 1000:
            raise _error("lag", self.lag, 'must be "auto" or between 1 and 1000')
        if self.commit_bytes != "auto" and not 1 <= self.commit_bytes <= _LARGEST:
            raise _error("commit_bytes", self.commit_bytes, f'must be "auto" or between 1 and {_LARGEST}')
        if self.load_decay != "auto" and not 0 <= self.load_decay < 1:
            raise _error("load_decay", self.load_decay, 'must be "auto", or from 0 to below 1')
        if self.max_backoff_steps < self.backoff_steps:
            raise _error("max_backoff_steps", self.max_backoff_steps, "must not be below backoff_steps")
        if not self.policy:
            raise _error("policy", self.policy, "must name a policy")

    @property
    def fingerprint(self) -> int:
        """A signed 64-bit hash of all options; a word of every vote."""
        return _fingerprint(self)

    @property
    def changed(self) -> dict[str, Any]:
        """The options that are not at their default."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> RebalanceConfig:
        """Make a configuration from a mapping, such as parsed JSON.

        Raises:
            ConfigError: For an unknown option (the message lists the known ones) or a bad value.
        """
        if not isinstance(options, Mapping):
            raise ConfigError(f"options must be a mapping from names to values, not {type(options).__name__}")
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}; known options: {', '.join(sorted(known))}")
        return cls(**options)

    @classmethod
    def from_env(cls, environ: Mapping[str, str], **options: Any) -> RebalanceConfig:
        """Make a configuration from variables ``EPLB_FSM_<OPTION>``; explicit ``options`` win over them.

        Args:
            environ: Usually ``os.environ``; the library never reads the environment by itself.
            **options: Options that were given explicitly.

        Raises:
            ConfigError: As :meth:`from_mapping`; a variable of that prefix that names no option, or a value that
                cannot be read, is named.
        """
        hints = typing.get_type_hints(cls)
        known = {ENV_PREFIX + field.name.upper(): field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for variable in sorted(environ):
            if variable.startswith(ENV_PREFIX) and variable not in known:
                raise ConfigError(f"the variable {variable} names no option; known: {', '.join(sorted(known))}")
        for variable, name in known.items():
            if variable in environ:
                values[name] = _parse(variable, environ[variable], hints[name])
        return cls.from_mapping({**values, **options})


@lru_cache
def _fingerprint(config: RebalanceConfig) -> int:
    text = json.dumps(asdict(config), sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _check_type(name: str, value: object) -> None:
    """Refuse what a dataclass would take: a string for a number, a bool for a count."""
    if isinstance(value, bool):
        raise _error(name, value, "must not be a boolean")
    default = RebalanceConfig.__dataclass_fields__[name].default
    wanted: type | types.UnionType = float | int if isinstance(default, float) else type(default)
    if name in _OR_AUTO:
        wanted = _OR_AUTO[name] | int | str
    if not isinstance(value, wanted):
        raise _error(name, value, f"must be of type {getattr(wanted, '__name__', wanted)}")
    if name in _OR_AUTO and isinstance(value, str) and value != "auto":
        raise _error(name, value, 'must be "auto" or a number')


def _as_float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise _error(name, value, f"must be at most {_LARGEST}") from None


def _error(name: str, value: object, rule: str) -> ConfigError:
    is_huge = isinstance(value, int) and value.bit_length() > 64  # Python refuses to write the longest ones
    shown = "a huge integer" if is_huge else repr(value)
    return ConfigError(f"{name} = {shown}: {rule}")


def _parse(variable: str, text: str, hint: object) -> Any:
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    if hint is float:
        kinds: tuple[type, ...] = (float,)
    elif hint is int:
        kinds = (int,)
    else:
        kinds = (*(kind for kind in typing.get_args(hint) if kind in (int, float)), str)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigError(f"{variable} = {text!r}: must be a number")
