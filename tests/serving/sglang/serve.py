"""SGLang's HTTP server, from its start to its certain end."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.serving.sglang.harness import EngineFailedError, engine_arguments, environment, started, tail

# Without it urllib would ask a proxy that the machine's environment may name.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        """Everything its processes have written until now."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def generate(self, prompt: Sequence[int], tokens: int, timeout_s: float = 120.0) -> list[int]:
        """The tokens that it generates greedily after a prompt."""
        sampling = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        answer = self.post("/generate", {"input_ids": list(prompt), "sampling_params": sampling}, timeout_s)
        return [int(token) for token in answer["output_ids"]]

    def post(self, path: str, body: Mapping[str, object], timeout_s: float = 120.0) -> dict[str, list[int]]:
        """The server's JSON answer to a JSON request."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with _OPENER.open(request, timeout=timeout_s) as response:
            return dict(json.load(response))


@contextmanager
def serving(
    checkpoint: Path,
    folder: Path,
    *,
    ranks: int = 1,
    arguments: Mapping[str, object] | None = None,
    variables: Mapping[str, str] | None = None,
    launcher: Sequence[str] = ("-m", "sglang.launch_server"),
    timeout_s: float = 600.0,
) -> Iterator[Server]:
    """A server that is up; all its processes are killed at the end. The folder gets its log."""
    options = engine_arguments(checkpoint, ranks, {"host": "127.0.0.1", **(arguments or {})})
    command = [*launcher, *_flags(options)]
    with started(command, folder, environment(ranks, variables)) as (process, log):
        server = Server(f"http://127.0.0.1:{options['port']}", process, log)
        _wait_until_up(server, time.monotonic() + timeout_s)
        yield server


def _flags(arguments: Mapping[str, object]) -> Iterator[str]:
    """Keyword arguments as flags of the command line."""
    for name, value in arguments.items():
        if value is False or value is None:
            continue
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield str(value)


def _wait_until_up(server: Server, deadline: float) -> None:
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise EngineFailedError(f"exit status {server.process.returncode}\n{tail(server.log_path)}")
        if _is_healthy(server.url):
            return
        time.sleep(0.2)
    raise EngineFailedError(f"the server was not up in time\n{tail(server.log_path)}")


def _is_healthy(url: str) -> bool:
    try:
        with _OPENER.open(f"{url}/health", timeout=30.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
