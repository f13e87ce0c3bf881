"""TLA+ values as TLC prints them, read into Python's: what states, traces and `PrintT` are made of."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

Value: TypeAlias = "int | bool | str | tuple[Value, ...] | frozenset[Value] | Record"
"""Numbers, booleans, strings, sequences, sets, and records and functions. All are hashable, as in TLA+."""

_TOKEN = re.compile(
    r"""\s*(?: (?P<string>"(?:[^"\\]|\\.)*") | (?P<number>-?\d+) | (?P<word>\w+)
           | (?P<mark><<|>>|\|->|:>|@@|\.\.|/\\|[][{}(),=]) )""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "f": "\f"}


class Record(dict["Value", "Value"]):
    """A record, or a function: a value for each field or argument. Do not change it; it is hashed by content."""

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none
        """Hash the content."""
        return hash(frozenset(self.items()))


def parse_value(text: str) -> Value:
    """Return the value that a text says.

    Args:
        text: One value, over one line or several.

    Raises:
        ValueError: If it is not one value that TLC prints; says what was expected, and where.
    """
    parser = _Parser(text)
    value = parser.value()
    parser.expect_end()
    return value


def parse_state(text: str) -> dict[str, Value]:
    """Return the value of each variable of a state, a conjunction of ``variable = value``.

    Raises:
        ValueError: If it is anything else.
    """
    parser = _Parser(text)
    state: dict[str, Value] = {}
    while parser.next:
        if parser.next == "/\\" or state:
            parser.take("/\\")
        name = parser.word()
        parser.take("=")
        state[name] = parser.value()
    return state


class _Parser:
    """Recursive descent over the tokens of one text; `next` is the one to come, empty at the end."""

    def __init__(self, text: str) -> None:
        self._text = text.rstrip()
        self._end = 0
        self._advance()

    def value(self) -> Value:
        """Read one value."""
        readers: dict[str, Callable[[], Value]] = {
            "<<": self._sequence,
            "{": self._set,
            "[": self._record,
            "(": self._function,
        }
        reader = readers.get(self.next)
        return reader() if reader else self._atom()

    def take(self, token: str) -> None:
        """Read this token."""
        if self.next != token:
            raise self._error(token)
        self._advance()

    def word(self) -> str:
        """Read a name."""
        if self._kind != "word":
            raise self._error("a name")
        name = self.next
        self._advance()
        return name

    def expect_end(self) -> None:
        """Nothing may follow."""
        if self.next:
            raise self._error("the end")

    def _advance(self) -> None:
        self._start = self._end
        if self._end == len(self._text):
            self.next, self._kind = "", "end"
            return
        match = _TOKEN.match(self._text, self._end)
        if match is None:
            self.next = self._text[self._end :].split()[0]
            raise self._error("a value")
        assert match.lastgroup is not None
        self._kind = match.lastgroup
        self.next = match[match.lastgroup]
        self._end = match.end()

    def _error(self, expected: str) -> ValueError:
        return ValueError(f"expected {expected} at character {self._start}, not {self.next[:40] or 'the end'!r}")

    def _atom(self) -> Value:
        text, kind = self.next, self._kind
        if kind not in ("string", "number", "word"):
            raise self._error("a value")
        self._advance()
        if kind == "string":
            return _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[1]), text[1:-1])
        if kind == "number":
            return self._interval(int(text)) if self.next == ".." else int(text)
        return {"TRUE": True, "FALSE": False}.get(text, text)

    def _interval(self, first: int) -> Value:
        self.take("..")
        last = self._atom()
        if not isinstance(last, int):
            raise self._error("the end of an interval before this")
        return frozenset(range(first, last + 1))

    def _separated(self, end: str, read: Callable[[], None]) -> None:
        """Read what is between a bracket that was just read and its end, separated by commas."""
        if self.next != end:
            read()
            while self.next == ",":
                self._advance()
                read()
        self.take(end)

    def _sequence(self) -> Value:
        self.take("<<")
        items: list[Value] = []
        self._separated(">>", lambda: items.append(self.value()))
        return tuple(items)

    def _set(self) -> Value:
        self.take("{")
        members: list[Value] = []
        self._separated("}", lambda: members.append(self.value()))
        return frozenset(members)

    def _record(self) -> Value:
        self.take("[")
        record = Record()
        self._separated("]", lambda: self._field(record, "|->", self.word))
        return record

    def _function(self) -> Value:
        self.take("(")
        function = Record()
        self._field(function, ":>", self.value)
        while self.next == "@@":
            self._advance()
            self._field(function, ":>", self.value)
        self.take(")")
        return function

    def _field(self, record: Record, arrow: str, read: Callable[[], Value]) -> None:
        name = read()
        self.take(arrow)
        record[name] = self.value()
