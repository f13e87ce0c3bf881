"""The configuration: every option refuses what cannot work, with one error that names option, value and rule."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_fsm import RebalanceConfig
from eplb_fsm.config import ENV_PREFIX
from eplb_fsm.errors import ConfigError

NAMES = [field.name for field in fields(RebalanceConfig)]
DEFAULTS = {field.name: field.default for field in fields(RebalanceConfig)}
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, 2**64, -(2**63), 10**400, 10**5000]),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)


@given(name=st.sampled_from(NAMES), value=ANYTHING)
def test_an_option_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    """Whatever an option is given, the configuration is made, or one ConfigError names it and says the rule."""
    said = ""
    try:
        made = RebalanceConfig(**{name: value})
        assert type(getattr(made, name)) is type(DEFAULTS[name]) or DEFAULTS[name] == "auto"
        assert isinstance(made.fingerprint, int)
    except ConfigError as error:
        said = str(error)
    # An option may also be refused for what it does not fit together with; then that one is named.
    assert not said or re.match(rf"({'|'.join(NAMES)}) = .*: must", said, re.DOTALL)
    assert not said or name in said


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [None, True, False, [], {}, object(), b"1"])
def test_every_option_refuses_foreign_types(name: str, value: Any) -> None:
    """No option takes None, a boolean, a container or bytes."""
    with pytest.raises(ConfigError, match=rf"^{name} = "):
        RebalanceConfig(**{name: value})


@pytest.mark.parametrize("name", [n for n in NAMES if not isinstance(DEFAULTS[n], str)])
@pytest.mark.parametrize("value", [-1, "5", float("nan"), float("inf"), float("-inf"), 2**63])
def test_every_number_refuses_what_is_no_usable_number(name: str, value: Any) -> None:
    """Negative, textual, infinite and undefined numbers, and those that no vote can carry, are refused."""
    with pytest.raises(ConfigError, match=rf"^{name} = "):
        RebalanceConfig(**{name: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "background"}, "mode = 'background': must be one of async, sync"),
        ({"integrity": "full"}, "must be one of off, wire, slot"),
        ({"plan_source": "any"}, "must be one of lowest_rank, every_rank"),
        ({"planner": "fork"}, "must be one of process, thread"),
        ({"lag": 0}, 'must be "auto" or between 1 and 1000'),
        ({"lag": "soon"}, 'must be "auto" or a number'),
        ({"commit_bytes": 0}, 'must be "auto" or between 1 and'),
        ({"commit_bytes": 2**63}, 'must be "auto" or between 1 and'),
        ({"commit_bytes": 1.5}, "must be of type"),
        ({"load_decay": 1}, 'load_decay = 1.0: must be "auto", or from 0 to below 1'),
        ({"load_decay": float("nan")}, 'must be "auto", or from 0 to below 1'),
        ({"policy": ""}, "must name a policy"),
        ({"vote_timeout_s": 0}, "must be a number of seconds above 0"),
        ({"backoff_steps": 50, "max_backoff_steps": 20}, "must not be below backoff_steps"),
        ({"cross_node_price": 1_000_001.0}, "cross_node_price = 1000001.0: must be at most 1000000"),
        ({"staging_buffers": 65}, "staging_buffers = 65: must be at most 64"),
    ],
)
def test_messages_say_the_rule(options: dict[str, Any], words: str) -> None:
    """The error holds the rule in words."""
    with pytest.raises(ConfigError) as raised:
        RebalanceConfig(**options)
    assert words in str(raised.value)


def test_equal_values_have_one_fingerprint() -> None:
    """5 and 5.0 seconds are one configuration: ranks that read it from different sources do not differ."""
    assert RebalanceConfig(vote_timeout_s=5).fingerprint == RebalanceConfig(vote_timeout_s=5.0).fingerprint
    assert RebalanceConfig(load_decay=0).fingerprint == RebalanceConfig(load_decay=0.0).fingerprint
    assert RebalanceConfig(lag=3).fingerprint != RebalanceConfig(lag=4).fingerprint


def test_a_mapping_may_hold_known_options_only() -> None:
    """from_mapping takes parsed JSON; an unknown option is an error that lists the known ones."""
    assert RebalanceConfig.from_mapping({"lag": 4, "mode": "sync"}) == RebalanceConfig(lag=4, mode="sync")
    with pytest.raises(ConfigError, match=r"unknown option 'step_intervall'; known options: .*step_interval"):
        RebalanceConfig.from_mapping({"step_intervall": 5})
    with pytest.raises(ConfigError, match="options must be a mapping"):
        RebalanceConfig.from_mapping([("lag", 4)])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown option 5"):
        RebalanceConfig.from_mapping({5: 5})  # type: ignore[dict-item]


def test_variables_are_read_and_options_win() -> None:
    """Variables of the environment give options their values; what is given explicitly wins."""
    environ = {"EPLB_FSM_LAG": "7", "EPLB_FSM_MIN_GAIN": "0.5", "EPLB_FSM_MODE": "sync", "HOME": "/"}
    config = RebalanceConfig.from_env(environ, mode="async")
    assert (config.lag, config.min_gain, config.mode) == (7, 0.5, "async")
    assert RebalanceConfig.from_env({"EPLB_FSM_LAG": "auto"}).lag == "auto"
    assert RebalanceConfig.from_env({"EPLB_FSM_LOAD_DECAY": "0.5"}).load_decay == 0.5
    assert RebalanceConfig.from_env({"EPLB_FSM_LOAD_DECAY": "auto"}).load_decay == "auto"


@given(name=st.sampled_from(NAMES), text=st.text(max_size=8))
def test_a_variable_is_taken_or_refused_by_name(name: str, text: str) -> None:
    """Whatever a variable holds, the configuration is made, or one ConfigError names the variable or its option."""
    variable = ENV_PREFIX + name.upper()
    said = variable
    try:
        RebalanceConfig.from_env({variable: text})
    except ConfigError as error:
        said = str(error)
    assert variable in said or name in said


def test_a_variable_that_names_no_option_is_refused() -> None:
    """A misspelt variable of the prefix is an error, not silence."""
    with pytest.raises(ConfigError, match="EPLB_FSM_STEP_INTERVALL names no option"):
        RebalanceConfig.from_env({"EPLB_FSM_STEP_INTERVALL": "5"})
