"""Running SGLang from the tests: in a virtual environment of its own, on any number of ranks, to its certain end.

The environment has what requirements.txt lists, installed with `--no-deps`, and the package in cpu_plugin/. Its
folder is named by SERVING_SGLANG_VENV; without that variable the tests here are skipped.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

VENV_VARIABLE = "SERVING_SGLANG_VENV"
WRONG_SLOT_VARIABLE = "SGLANG_ON_CPU_WRONG_SLOT"
"""`layer,rank,slot`, for cpu_plugin: that rank computes what belongs to that slot with the next one's weights."""

requires_sglang = pytest.mark.skipif(
    not os.environ.get(VENV_VARIABLE), reason=f"{VENV_VARIABLE} names no virtual environment with SGLang"
)

PROMPTS: tuple[tuple[int, ...], ...] = ((5, 6, 7, 8), (9, 10, 11))

_SCRIPT = Path(__file__).with_name("run_engine.py")
_MOVED = re.compile(r"changed_physical_slots=(\d+)/\d+")

# SGLang chooses kernels for a GPU unless told otherwise; and a limit on tokens, since it cannot tell how much memory
# a rank may take where several ranks share a NUMA node.
_ON_CPU: dict[str, object] = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "max_total_tokens": 2048,
    "max_running_requests": 4,
    "disable_radix_cache": True,  # a second round shall compute as much as the first
    "skip_server_warmup": True,  # its passes would count towards a rebalance
    "random_seed": 1,
    "log_level": "info",  # what EPLB did is told at that level
}


class EngineFailedError(Exception):
    """The engine ended without a result, or not in time; the message ends with its log."""


@dataclass(frozen=True)
class Outcome:
    """What an engine generated: tokens by round and prompt, seconds, and everything its processes wrote."""

    tokens: list[list[list[int]]]
    startup_s: float
    round_s: list[float]
    log: str


def run_engine(
    checkpoint: Path,
    folder: Path,
    *,
    ranks: int = 1,
    arguments: Mapping[str, object] | None = None,
    variables: Mapping[str, str] | None = None,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    tokens: int = 64,
    rounds: int = 1,
    prompts_of_rounds: Sequence[Sequence[Sequence[int]]] | None = None,
    timeout_s: float = 600.0,
) -> Outcome:
    """Generate with an engine of its own, the same tokens in each round or others; the folder gets its log."""
    job = {
        "engine": engine_arguments(checkpoint, ranks, {"skip_tokenizer_init": True, **(arguments or {})}),
        "tokens": tokens,
        "rounds": prompts_of_rounds or [prompts] * rounds,
    }
    command = [str(_SCRIPT), json.dumps(job)]
    with started(command, folder, environment(ranks, variables)) as (process, log):
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise EngineFailedError(f"no result within {timeout_s} s\n{tail(log)}") from None
    if status:
        raise EngineFailedError(f"exit status {status}\n{tail(log)}")
    text = log.read_text(encoding="utf-8", errors="replace")
    result = [line for line in text.splitlines() if line.startswith("{")][-1]  # SGLang still logs at its exit
    return Outcome(**json.loads(result), log=text)


def own_eplb(every: int = 10, redundant: int = 4) -> dict[str, object]:
    """The engine arguments that switch SGLang's own EPLB on: a rebalance every so many passes."""
    return {
        "enable_eplb": True,
        "ep_num_redundant_experts": redundant,
        "eplb_rebalance_num_iterations": every,
    }


def moved_slots(log: str) -> list[int]:
    """How many slots got another expert, by rebalance; from the log of an engine that ran with its own EPLB."""
    return [int(number) for number in _MOVED.findall(log)]


def engine_arguments(checkpoint: Path, ranks: int, more: Mapping[str, object] | None = None) -> dict[str, object]:
    """Keyword arguments of `sglang.Engine`: a CPU, and expert parallelism over all ranks."""
    return {
        "model_path": str(checkpoint),
        **_ON_CPU,
        "tp_size": ranks,
        "ep_size": ranks,
        "port": free_port(),
        "nccl_port": free_port(),
        **(more or {}),
    }


def environment(ranks: int, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of an engine: SGLang's settings, and ours without our packages and options.

    The library refuses a variable of its prefix that names no option, as the one of the virtual environment.
    """
    cores = sorted(os.sched_getaffinity(0))
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "EPLB_FSM_"))},
        "SGLANG_USE_CPU_ENGINE": "1",
        # Else SGLang refuses more ranks than there are NUMA nodes.
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks)),
        "SGLANG_LOG_EXPERT_LOCATION_METADATA": "1",  # how many slots each rebalance moves
        "OMP_NUM_THREADS": "1",  # threads of several ranks that spin on the same cores make them five times slower
        "GLOO_SOCKET_IFNAME": "lo",  # the name of the host may not resolve
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        **(more or {}),
    }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 60) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@contextmanager
def started(
    command: Sequence[str], folder: Path, variables: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A command of the engine's Python and its log; at the end its whole process group is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    # -P: the folder of a script, or ours, shall not hide packages of the engine's environment.
    python = [str(Path(os.environ[VENV_VARIABLE]) / "bin" / "python"), "-P", "-W", "ignore"]
    # SGLang leaves its sockets behind. A folder of the caller's could have a longer path than a socket may.
    with TemporaryDirectory(prefix="sglang-") as scratch:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*python, *command],
                cwd=folder,
                env={**variables, "TMPDIR": scratch},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process, log
        finally:
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the group even if its leader has ended: others of it may go on without it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
