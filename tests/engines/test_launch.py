"""Starting ranks: results, messages, and no process left behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eplb_fsm.engines.reference.launch import launch
from eplb_fsm.engines.reference.ranks import joined
from eplb_fsm.errors import ConfigError, RankError
from tests.engines.light_ranks import die, send_and_return
from tests.engines.processes import restore_sigint

ROOT = Path(__file__).resolve().parents[2]


def alive(pid: int) -> bool:
    """Whether the process exists and is not just waiting to be reaped by somebody else."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return not Path("/proc").is_dir()


def wait_until_gone(folder: Path, ranks: int) -> list[int]:
    """The processes noted by :func:`die` that still live after a while."""
    pids = [int(pid) for rank in range(ranks) for pid in (folder / f"{rank}.pid").read_text().split()]
    for _ in range(100):
        left = [pid for pid in pids if alive(pid)]
        if not left:
            return []
        time.sleep(0.1)
    return left


def test_results_and_messages_come_back_by_rank() -> None:
    """Each rank knows its place, uses one thread, and what it sends arrives in order."""
    messages: list[tuple[int, object]] = []
    results = launch(send_and_return, 2, on_message=lambda rank, message: messages.append((rank, message)))
    assert results == [(0, 2, 1), (1, 2, 1)]
    for rank in (0, 1):
        assert [m for r, m in messages if r == rank] == [("hello", rank), ("again", rank)]


@pytest.mark.parametrize(
    ("how", "reason"),
    [("kill", "killed by SIGKILL"), ("raise", "ValueError: the reason of the test"), ("exit", "exit status 7")],
)
def test_a_dead_rank_is_named_and_ends_the_others(tmp_path: Path, how: str, reason: str) -> None:
    """The error names the rank that died first and why; no rank and none of their children is left."""
    with pytest.raises(RankError, match=f"^rank 1 .*{reason}") as caught:
        launch(die, 3, (1, how, str(tmp_path)), grace_s=0.5)
    assert caught.value.ranks == (1,)
    assert wait_until_gone(tmp_path, 3) == []


def test_ranks_that_never_end_are_named(tmp_path: Path) -> None:
    """A limit on the run ends it, names who was late, and leaves nothing."""
    with pytest.raises(RankError, match="did not end within"):
        launch(die, 2, (-1, "", str(tmp_path)), timeout_s=15)
    assert wait_until_gone(tmp_path, 2) == []


LAUNCHER = """
import sys
from eplb_fsm.engines.reference.launch import launch
from tests.engines.light_ranks import die
if __name__ == "__main__":
    launch(die, 2, (-1, "", sys.argv[1]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_launcher_that_dies_takes_its_ranks_along(tmp_path: Path, how: signal.Signals) -> None:
    """Also a launcher that is killed leaves no rank behind, nor what the ranks started."""
    script = tmp_path / "launcher.py"
    script.write_text(LAUNCHER)
    launcher = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        preexec_fn=restore_sigint,
    )
    notes = [tmp_path / "0.pid", tmp_path / "1.pid"]
    for _ in range(600):
        if all(note.exists() and note.read_text() for note in notes):
            break
        time.sleep(0.1)
    launcher.send_signal(how)
    launcher.wait(30)
    assert wait_until_gone(tmp_path, 2) == []


def test_without_ranks_in_the_environment_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining outside of torchrun says how to start; a number that is none is named."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="torchrun"), joined():
        pass
    monkeypatch.setenv("RANK", "one")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match="RANK is 'one'"), joined():
        pass


def test_at_least_one_rank() -> None:
    """Zero ranks are refused."""
    with pytest.raises(ConfigError, match="at least one"):
        launch(send_and_return, 0)


TORCHRUN = """
import sys
from pathlib import Path
from eplb_fsm.engines.reference.ranks import joined
from tests.engines.light_ranks import send_and_return
if __name__ == "__main__":
    with joined() as context:
        context.store.set(str(context.rank), "here")
        context.store.wait([str(rank) for rank in range(context.world_size)])
        Path(sys.argv[1], str(context.rank)).write_text(str(send_and_return(context)))
"""


def test_ranks_join_under_torchrun(tmp_path: Path) -> None:
    """The same ranks run under torchrun, store included."""
    script = tmp_path / "ranks.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["(0, 2, 1)", "(1, 2, 1)"]
