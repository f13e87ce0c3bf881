"""Starts vLLM in an environment of its own and brings back what it said.

SERVING_VLLM_VENV names that environment: a virtual environment with `requirements.txt` (`pip install --no-deps -r`;
torch as built for CPUs) and `cpu_plugin` (`pip install --no-deps`) of this folder. Nothing here imports vLLM.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

VENV_VARIABLE = "SERVING_VLLM_VENV"
FOLDER = Path(__file__).resolve().parent
_PATIENCE_S = 10

# Two ranks of a model this small compute with one thread each, and talk through the loopback device.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The engine's core runs in the process that asks for tokens: one process less to start, and all prompts are there
    # before its first step, so that every run forms the same batches.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "60",  # two workers take ten to end by themselves, or they are killed
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}

# A port, an address or an option meant for something else. Without these, vLLM asks the kernel for free ports.
_FOREIGN = ("VLLM_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONPATH", "PYTHONHOME")

_LLM = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,  # a second round shall compute what the first one did
    "disable_log_stats": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "seed": 0,
}

Maps = list[list[list[int]]]


@dataclass(frozen=True)
class EngineRun:
    """What one run of the engine left."""

    tokens: list[list[list[int]]]
    """Per round and prompt."""
    maps: list[list[Maps]]
    """When loaded and after each round, per rank and MoE layer: the physical experts of each logical one."""
    load_s: float
    round_s: list[float]
    log: str
    """What all processes of the engine logged."""


class EngineError(Exception):
    """The engine ended badly, or not in time; the message ends with its log."""


def engine_python() -> Path:
    """The interpreter of the engine's environment; skips the test where there is none."""
    folder = os.environ.get(VENV_VARIABLE)
    if not folder:
        pytest.skip(f"{VENV_VARIABLE} names no environment with vLLM")
    return Path(folder) / "bin" / "python"


def fixed_prompts(num_prompts: int = 8, length: int = 8, vocab_size: int = 512, seed: int = 0) -> list[list[int]]:
    """Prompts as token ids, the same ones every time."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for _ in range(num_prompts)]


def run_engine(
    model: Path,
    *,
    num_tokens: int = 96,
    rounds: int = 1,
    prompts: list[list[int]] | None = None,
    prompts_of_rounds: list[list[list[int]]] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600,
    **llm: Any,
) -> EngineRun:
    """Load the model, generate greedily, and wait for the end of all processes.

    Args:
        model: folder of the checkpoint.
        num_tokens: how many tokens to generate for each prompt in each round.
        rounds: how often to generate them.
        prompts: token ids; those of `fixed_prompts` by default.
        prompts_of_rounds: other ones in each round.
        environment: variables for the engine's processes, besides and before those that it needs on a CPU.
        timeout_s: when to kill it.
        **llm: further keyword arguments of `vllm.LLM`, such as `tensor_parallel_size` and `eplb_config`.
    """
    request = {
        "llm": {**_LLM, "model": str(model), **llm},
        "num_tokens": num_tokens,
        "rounds": prompts_of_rounds or [prompts or fixed_prompts()] * rounds,
    }
    output, log = run_script("run_engine.py", request, environment or {}, timeout_s)
    return EngineRun(**output, log=log)


def run_script(
    name: str, request: Mapping[str, Any], environment: Mapping[str, str], timeout_s: float
) -> tuple[dict[str, Any], str]:
    """Run a script of this folder in the engine's environment; what it printed, and the log.

    Args:
        name: of the script's file.
        request: its argument.
        environment: variables for its processes, besides and before those that vLLM needs on a CPU.
        timeout_s: when to kill it.
    """
    command = [str(engine_python()), str(FOLDER / name), json.dumps(request)]
    # The engine leaves sockets and rendezvous files wherever temporary files go.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        variables = _environment({"TMPDIR": folder, **environment})
        status, output, log = _run_to_its_end(command, variables, Path(folder), timeout_s)
    if status != 0 or not output:
        raise EngineError(f"{'killed' if status is None else f'exit status {status}'}\n{log}")
    return json.loads(output), log


def _environment(further: Mapping[str, str]) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**ours, **_ENVIRONMENT, **further}


def _run_to_its_end(
    command: list[str], environment: dict[str, str], folder: Path, timeout_s: float
) -> tuple[int | None, str, str]:
    """The exit status, or None after the time-out, and both outputs; nobody of the process group lives on.

    The outputs go to files: a pipe would stay open as long as any process of the engine lives.
    """
    stdout, stderr = folder / "stdout", folder / "stderr"
    with stdout.open("w") as out, stderr.open("w") as err:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        _end_group(process)
    return status, stdout.read_text(encoding="utf-8"), stderr.read_text(encoding="utf-8")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask first: then Python's tracker of shared memory, which outlives the others, has the time to free it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            deadline = time.monotonic() + _PATIENCE_S
            while time.monotonic() < deadline:
                process.poll()  # a zombie would count as a member
                os.killpg(process.pid, 0)  # raises when nobody is left
                time.sleep(0.1)
    process.wait()
