"""Policies by name: built in, registered, and from entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import numpy as np
import pytest

from eplb_fsm.errors import ConfigError
from eplb_fsm.placement import (
    Placement,
    RebalancePolicy,
    Topology,
    get_policy,
    policy_names,
    register_policy,
)
from eplb_fsm.placement.policies import registry


class Still:
    """A policy that moves nothing."""

    name = "still"
    deterministic = True

    def plan(self, load: np.ndarray, current: Placement, topology: Topology) -> Placement:
        return current


BUILT_IN = ("movement_aware", "deepseek", "deepseek_hierarchical", "deepseek_global")
NOT_A_POLICY = object()
BROKEN_MODULE = "no_such_module_of_a_policy:Policy"


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))


def entry_point(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Make `value` look installed as the policy "installed"."""
    entry = EntryPoint("installed", value, registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])


def test_built_in_names() -> None:
    """The movement-aware policy and DeepSeek's variants are there, deterministic, under their own names."""
    for name in BUILT_IN:
        policy = get_policy(name)
        assert isinstance(policy, RebalancePolicy)
        assert policy.name == name
        assert policy.deterministic
    assert set(policy_names()) >= set(BUILT_IN)


class Aiming(Still):
    """A policy that wants to know the target."""

    name = "aiming"

    def __init__(self, target_balancedness: float) -> None:
        self.target = target_balancedness


def test_a_factory_that_asks_for_the_target_gets_it() -> None:
    """The target goes to a factory that has a parameter of that name, and to no other."""
    register_policy(Aiming, "aiming")
    register_policy(Still, "still_too")
    policy = get_policy("aiming", 0.7)
    assert isinstance(policy, Aiming)
    assert policy.target == 0.7
    assert isinstance(get_policy("still_too", 0.7), Still)


def test_an_unknown_name_lists_the_known() -> None:
    """The error for a misspelt name shows what there is."""
    with pytest.raises(ConfigError, match=r"'deepsek'.*deepseek, deepseek_global, deepseek_hierarchical"):
        get_policy("deepsek")


def test_register_an_object_a_class_and_a_factory() -> None:
    """An object is returned as it is, a class or factory makes a new policy each time."""
    policy = Still()
    register_policy(policy)
    assert get_policy("still") is policy
    register_policy(Still, name="still_class")
    assert get_policy("still_class") is not get_policy("still_class")
    register_policy(lambda: policy, name="still_factory")
    assert get_policy("still_factory") is policy
    assert {"still", "still_class", "still_factory"} <= set(policy_names())


@pytest.mark.parametrize(
    ("policy", "name", "message"),
    [
        (Still(), "deepseek", "exists already"),
        (lambda: Still(), None, "pass name="),
        (NOT_A_POLICY, "x", "no plan"),
        (Still(), "", "pass name="),
    ],
)
def test_bad_registrations_are_refused(policy: object, name: str | None, message: str) -> None:
    """A taken or missing name and an object that is no policy are errors at registration."""
    with pytest.raises(ConfigError, match=message):
        register_policy(policy, name=name)  # type: ignore[arg-type]


def test_a_factory_of_something_else_is_refused() -> None:
    """What a factory returns is checked when it is asked for."""
    register_policy(lambda: 7, name="seven")  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match="'seven' is a int"):
        get_policy("seven")


@pytest.mark.parametrize("attribute", ["Still", "STILL"])
def test_entry_points(monkeypatch: pytest.MonkeyPatch, attribute: str) -> None:
    """An installed class or object is found by its entry point's name and is listed."""
    monkeypatch.setattr(f"{__name__}.STILL", Still(), raising=False)
    entry_point(monkeypatch, f"{__name__}:{attribute}")
    assert isinstance(get_policy("installed"), Still)
    assert "installed" in policy_names()
    with pytest.raises(ConfigError, match="exists already"):
        register_policy(Still(), name="installed")


@pytest.mark.parametrize(
    ("value", "message"),
    [(BROKEN_MODULE, "cannot be imported"), (f"{__name__}:NOT_A_POLICY", "not a policy or a factory")],
)
def test_broken_entry_points_are_refused(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    """An entry point that cannot be used says which one it is."""
    entry_point(monkeypatch, value)
    with pytest.raises(ConfigError, match=message):
        get_policy("installed")
