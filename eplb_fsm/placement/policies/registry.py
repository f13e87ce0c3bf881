"""Policies by name: built in, registered by the program, or published as entry points."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from eplb_fsm.config import DEFAULT_TARGET_BALANCEDNESS
from eplb_fsm.errors import ConfigError
from eplb_fsm.placement.policies.deepseek import DeepseekPolicy
from eplb_fsm.placement.policies.movement_aware import MovementAwarePolicy
from eplb_fsm.placement.policies.protocol import RebalancePolicy
from eplb_fsm.placement.policies.refined import RefinedPolicy

ENTRY_POINT_GROUP = "eplb_fsm.policies"
PolicyFactory = Callable[..., RebalancePolicy]
"""Called with those of the keywords `target_balancedness` and `replica_split` that its signature has."""

_factories: dict[str, PolicyFactory] = {
    "movement_aware": MovementAwarePolicy,
    "deepseek": lambda: DeepseekPolicy("auto"),
    "deepseek_hierarchical": lambda: DeepseekPolicy("hierarchical"),
    "deepseek_global": lambda: DeepseekPolicy("global"),
    "deepseek_refined": RefinedPolicy,
}


def register_policy(policy: RebalancePolicy | PolicyFactory, name: str | None = None) -> None:
    """Make a policy selectable by name in this process.

    Args:
        policy: A policy, or something that returns one when called without arguments (a class, say).
        name: The name; the policy's own `name` by default, so a factory without one needs it.

    Raises:
        ConfigError: no name is known, the name is taken, or the object is not a policy.
    """
    chosen = name if name is not None else getattr(policy, "name", None)
    if not isinstance(chosen, str) or not chosen:
        raise ConfigError(f"cannot tell the name of policy {policy!r}; pass name=")
    if chosen in policy_names():
        raise ConfigError(f"a policy named {chosen!r} exists already; choose another name")
    if isinstance(policy, type) or not isinstance(policy, RebalancePolicy):
        if not callable(policy):
            raise ConfigError(f"policy {chosen!r} has no plan(load, current, topology): {policy!r}")
        _factories[chosen] = policy
    else:
        _factories[chosen] = _constant(policy)


def get_policy(
    name: str, target_balancedness: float = DEFAULT_TARGET_BALANCEDNESS, replica_split: str = "equal"
) -> RebalancePolicy:
    """The policy of that name, or at ``package.module:attribute``; what a factory makes is made anew by each call.

    Args:
        name: The name.
        target_balancedness: Balancedness at which a layer is good enough, for policies that know the word.
        replica_split: How tokens are divided among replicas, "equal" or "weighted", likewise.

    Raises:
        ConfigError: the name is unknown (the message lists the known ones), or what it names cannot be
            imported or is not a policy.
    """
    factory = _factories.get(name)
    if factory is None:
        entry = _entry_point(name)
        if entry is None:
            raise ConfigError(
                f"unknown policy {name!r}; choose one of {', '.join(policy_names())}, "
                "or name one as package.module:attribute"
            )
        factory = _imported(entry)
    try:
        known = {"target_balancedness": target_balancedness, "replica_split": replica_split}
        taken = _parameters(factory)
        policy = factory(**{name: value for name, value in known.items() if name in taken})
    except Exception as error:  # whatever foreign code raises
        raise ConfigError(f"policy {name!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(policy, RebalancePolicy):
        raise ConfigError(
            f"policy {name!r} is a {type(policy).__name__} without name, deterministic or plan(); "
            "implement eplb_fsm.placement.RebalancePolicy"
        )
    return policy


def _parameters(factory: PolicyFactory) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(factory).parameters)
    except ValueError:  # some callables of C have no signature
        return ()


def policy_names() -> tuple[str, ...]:
    """All names that :func:`get_policy` knows, sorted."""
    return tuple(sorted({*_factories, *_entry_points()}))


def _entry_point(name: str) -> EntryPoint | None:
    """The entry point of that name; ``package.module:attribute`` is one without being installed."""
    if ":" in name:
        return EntryPoint(name, name, ENTRY_POINT_GROUP)
    return _entry_points().get(name)


def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}


def _imported(entry: EntryPoint) -> PolicyFactory:
    try:
        found = entry.load()
    except Exception as error:  # whatever a foreign module raises while it is imported
        raise ConfigError(
            f"policy {entry.name!r} of entry point {entry.value!r} cannot be imported ({error}); "
            "repair or uninstall the package that provides it"
        ) from error
    if isinstance(found, RebalancePolicy) and not isinstance(found, type):
        return _constant(found)
    if not callable(found):
        raise ConfigError(f"entry point {entry.value!r} of policy {entry.name!r} is not a policy or a factory")
    factory: PolicyFactory = found
    return factory


def _constant(policy: RebalancePolicy) -> PolicyFactory:
    return lambda: policy
