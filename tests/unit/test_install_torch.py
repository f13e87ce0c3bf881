"""The order in which a torch is looked for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(name="installer")
def load_installer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with no torch found and every command failing unless a test says otherwise."""
    spec = importlib.util.spec_from_file_location("install_torch", ROOT / "tools/install_torch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.delenv("TORCH", raising=False)
    monkeypatch.setattr(module, "installed_torch", lambda: None)
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    return module


def commands(monkeypatch: pytest.MonkeyPatch, installer: ModuleType, succeeds: str | None = None) -> list[str]:
    """Run the script with commands replaced; return what it would have run, without the interpreter."""
    ran: list[str] = []

    def run(command: tuple[str, ...], **_: object) -> SimpleNamespace:
        ran.append(" ".join(command).replace(sys.executable, "python"))
        return SimpleNamespace(returncode=0 if succeeds is not None and succeeds in ran[-1] else 1)

    monkeypatch.setattr(installer.subprocess, "run", run)
    status = installer.main()
    assert status == (1 if succeeds is None or not any(succeeds in line for line in ran) else 0)
    return ran


def test_cpu_build_first(monkeypatch: pytest.MonkeyPatch, installer: ModuleType) -> None:
    """Without a GPU a CPU build is tried by name, and nothing else when it is there."""
    assert commands(monkeypatch, installer, succeeds="+cpu") == ["python -m pip install -q torch==2.13.0+cpu"]


def test_order_without_gpu(monkeypatch: pytest.MonkeyPatch, installer: ModuleType) -> None:
    """Without a GPU the CPU build comes before uv, and plain torch comes last."""
    monkeypatch.setattr(installer.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    tried = installer.attempts("torch>=2.6", "", "Linux", False)
    assert [attempt.commands[-1][-1] for attempt in tried] == [
        "torch==2.13.0+cpu",
        "torch>=2.6",
        "torch>=2.6",
    ]
    assert "--torch-backend=cpu" in tried[1].commands[-1]
    assert "--torch-backend=cpu" not in tried[2].commands[-1]


def test_all_attempts_fail(monkeypatch: pytest.MonkeyPatch, installer: ModuleType) -> None:
    """When nothing works the script fails, after it tried plain torch."""
    assert commands(monkeypatch, installer)[-1] == "python -m pip install -q torch>=2.6"


@pytest.mark.parametrize(("system", "gpu"), [("Linux", True), ("Darwin", False), ("Windows", True)])
def test_plain_torch(installer: ModuleType, system: str, gpu: bool) -> None:
    """With a GPU, and outside Linux, plain torch is the only attempt."""
    (attempt,) = installer.attempts("torch>=2.6", "", system, gpu)
    assert attempt.commands == ((*installer.PIP, "torch>=2.6"),)


@pytest.mark.parametrize("gpu", [True, False])
def test_chosen_torch(installer: ModuleType, gpu: bool) -> None:
    """What TORCH says is handed to pip as it stands, and nothing else is tried."""
    (attempt,) = installer.attempts("torch>=2.6", "torch==2.9.1 --pre", "Linux", gpu)
    assert attempt.commands == ((*installer.PIP, "torch==2.9.1", "--pre"),)


@pytest.mark.parametrize(("version", "kept"), [("2.13.0+cpu", True), ("2.9.0a0+vendor", True), ("2.5.1", False)])
def test_torch_that_is_there(monkeypatch: pytest.MonkeyPatch, installer: ModuleType, version: str, kept: bool) -> None:
    """A torch that is there and fits is kept, whatever its build; one that is too old is not."""
    monkeypatch.setattr(installer, "installed_torch", lambda: version)
    monkeypatch.setattr(installer.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert installer.main() == (0 if kept else 1)


def test_named_build_fits_the_project(installer: ModuleType) -> None:
    """The range comes from pyproject.toml, and the CPU build that is asked for by name satisfies it."""
    requirement = installer.Requirement(installer.torch_requirement(ROOT / "pyproject.toml"))
    assert requirement.name == "torch"
    assert requirement.specifier.contains(installer.CPU_BUILD.split("==")[1])


def test_gpu_question_never_raises(installer: ModuleType) -> None:
    """Asking for a GPU works on a machine that has no driver."""
    code = "import runpy; print(runpy.run_path('tools/install_torch.py')['has_nvidia_gpu']())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() in {"True", "False"}
