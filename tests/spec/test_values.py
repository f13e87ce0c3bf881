"""TLC's values in Python."""

from __future__ import annotations

import pytest

from eplb_fsm.modelcheck.values import Record, parse_state, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-12", -12),
        ("TRUE", True),
        ("FALSE", False),
        (r'"a \"b\" \\ \n"', 'a "b" \\ \n'),
        ("rank_1", "rank_1"),
        ("<<>>", ()),
        ('<<1, <<2>>, "x">>', (1, (2,), "x")),
        ("{}", frozenset()),
        ("-1..1", frozenset([-1, 0, 1])),
        ("{{1}, {}}", frozenset([frozenset([1]), frozenset()])),
        ("[a |-> 1,\n   b |-> {[c |-> TRUE]}]", {"a": 1, "b": frozenset([Record(c=True)])}),
        ('( 0 :> <<1>> @@\n  1 :> [x |-> "y"] )', {0: (1,), 1: {"x": "y"}}),
        ('("a" :> 1)', {"a": 1}),
    ],
)
def test_values_are_read(text: str, value: object) -> None:
    """Every kind of value comes out as the Python value of the same meaning and type."""
    read = parse_value(text)
    assert read == value
    assert type(read) is (Record if isinstance(value, dict) else type(value))
    assert hash(read) == hash(parse_value(f" {text}\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected a value at character 0, not 'the end'"),
        ("<<1, >>", "expected a value at character 4, not '>>'"),
        ("{1", "expected } at character 2, not 'the end'"),
        ("[a = 1]", r"expected \|-> at character 2, not '='"),
        ("[1 |-> 1]", "expected a name at character 1, not '1'"),
        ("1..a", "expected the end of an interval"),
        ("1 2", "expected the end at character 1, not '2'"),
        ("1 ? 2", "expected a value at character 1, not '\\?'"),
    ],
)
def test_what_is_no_value_is_refused(text: str, expected: str) -> None:
    """Anything else is an error that says where and what."""
    with pytest.raises(ValueError, match=expected):
        parse_value(text)


def test_states_are_read() -> None:
    """A state is one conjunct for each variable; one variable alone has no mark of a conjunction."""
    assert parse_state('/\\ x = 1\n/\\ y = (0 :> "a" @@\n 1 :> "b")') == {"x": 1, "y": {0: "a", 1: "b"}}
    assert parse_state("x = <<>>") == {"x": ()}
    with pytest.raises(ValueError, match="expected = at"):
        parse_state("/\\ x")
    with pytest.raises(ValueError, match=r"expected /\\ at"):
        parse_state("x = 1 y = 2")
