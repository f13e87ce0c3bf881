"""Graphs of canonical states, and what one has that another has not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

from eplb_fsm.modelcheck.values import Value

Edge: TypeAlias = tuple[int, int, int]
"""The numbers of a state, of the call made in it, and of the state that it leads to."""


class Call(NamedTuple):
    """One call of a core: an action of the spec, the rank that takes it, and what it is given or returns."""

    action: str
    rank: int
    argument: Value


class Table:
    """Numbers values: equal ones get the same number."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._values: list[Any] = []

    def number(self, value: Any) -> int:
        """Return the number of a value."""
        number = self._numbers.setdefault(value, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        return number

    def value(self, number: int) -> Any:
        """Return the value of a number."""
        return self._values[number]


class Graph:
    """Edges between canonical states, in the order in which they were found.

    A canonical state is what the spec's `core` and `cast` are: for each rank the record of its core, then for each
    rank its votes. Values are numbered in a table that the graphs to be compared share.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.initial = -1
        self.edges: dict[Edge, None] = {}

    def calls(self) -> set[Call]:
        """Return all calls that were made."""
        return {self.table.value(call) for _, call, _ in self.edges}

    def state_changes(self) -> set[tuple[str, str]]:
        """Return the states that a rank was in before and after a call."""
        changes = set()
        for source, call, target in self.edges:
            rank = self.table.value(call).rank
            before, after = (self.table.value(self.table.value(state)[rank]) for state in (source, target))
            changes.add((before["state"], after["state"]))
        return changes

    def cores(self) -> list[dict[str, Any]]:
        """Return the records of all cores that were reached."""
        states = {state for source, _, target in self.edges for state in (source, target)}
        parts = {part for state in states for part in self.table.value(state)}
        return [value for value in map(self.table.value, parts) if isinstance(value, dict)]


def describe_difference(one: Graph, name: str, other: Graph, other_name: str) -> str:
    """Return the first edge that only one of two graphs has, with both its states; empty if they are equal."""
    if one.initial != other.initial:
        return f"the initial states differ: {one.table.value(one.initial)} and {other.table.value(other.initial)}"
    lines: list[str] = []
    for graph, its_name, without in ((one, name, other), (other, other_name, one)):
        only = [edge for edge in graph.edges if edge not in without.edges]
        if only:
            lines.append(f"{len(only)} edges are only in the graph of {its_name}; the first:")
            lines += _describe(graph, only[0], without)
    return "\n".join(lines)


def _describe(graph: Graph, edge: Edge, other: Graph) -> Iterator[str]:
    value = graph.table.value
    source, call, target = edge
    yield from (f"  before: {value(part)}" for part in value(source))
    yield f"  {value(call)}"
    yield from (f"  after:  {value(part)}" for part in value(target))
    for its_source, its_call, its_target in other.edges:
        if (its_source, its_call) == (source, call):
            yield "  the other graph makes the same call there, with this after it instead:"
            yield from (f"  after:  {value(part)}" for part in value(its_target) if part not in value(target))
