"""Whole engines on CPUs, with their own rebalance and with this library's: what they call after a forward pass, timed.

vLLM's asynchronous EPLB and SGLang's blocking rebalance against this library in their place, with its own policy and
with DeepSeek's, which is theirs: the same model (random, 8 layers, 64 experts in 72 slots, 1.5 MB each), requests,
ranks and interval, one engine after the other, several times. ``make test-engines`` makes the environments; then

    SERVING_SGLANG_VENV=$PWD/.venv-sglang SERVING_VLLM_VENV=$PWD/.venv-vllm python -m tests.benchmarks.whole_engines
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.ranks import report
from tests.serving.sglang import checkpoint as sglang_checkpoint
from tests.serving.sglang import harness as sglang
from tests.serving.sglang.checkpoint import VOCABULARY
from tests.serving.sizes import SERVING_WORK
from tests.serving.vllm import checkpoint as vllm_checkpoint
from tests.serving.vllm import harness as vllm
from tests.serving.vllm.test_own_eplb import OWN_EPLB

INTERVAL = 96
"""Passes between two rebalances; all figures called so are of so many steps."""
NUM_ROUNDS = 8
PROMPTS = [vllm.fixed_prompts(vocab_size=VOCABULARY, seed=seed) for seed in range(NUM_ROUNDS)]
"""Others in every round, as long as an interval: so the load is never quite the one that was planned for."""
NUM_REDUNDANT = 8
WARM_UP = INTERVAL + INTERVAL // 2
"""Steps that are left out: of the first pass and of the first rebalance."""

Run = Callable[[Path, Mapping[str, str]], str]
"""Serves with variables of the environment, in a folder, and returns the log."""


class Contender(NamedTuple):
    """Who rebalances in which engine.

    Attributes:
        engine: "vllm" or "sglang".
        moved: What one rank's log says of a rebalance that moved experts.
        variables: That make it so.
    """

    engine: str
    moved: str
    variables: Mapping[str, str]


OURS = r"epoch \d+: COMMITTED"
EVEN_IF_SMALL = {
    "EPLB_FSM_MIN_GAIN": "0",
    "EPLB_FSM_HORIZON_STEPS": "0",
    "EPLB_FSM_TARGET_BALANCEDNESS": "1",
}
"""Rebalance for any gain, as the others do; everything else is at its default."""
BACKGROUND = {"ENABLE_EPLB_REBALANCE_ASYNC": "1", **EVEN_IF_SMALL}
DEEPSEEK = {"EPLB_FSM_POLICY": "deepseek_global"}
CONTENDERS = {
    "vllm_async": Contender("vllm", r"Rearranging experts \(async mode\)", {}),
    "ours_in_vllm": Contender("vllm", OURS, BACKGROUND),
    "ours_in_vllm:deepseek_global": Contender("vllm", OURS, {**BACKGROUND, **DEEPSEEK}),
    "sglang": Contender("sglang", r"TP0.*\[EPLBManager\] rebalance end", {}),
    "ours_in_sglang": Contender("sglang", OURS, BACKGROUND),
    "ours_in_sglang:deepseek_global": Contender("sglang", OURS, {**BACKGROUND, **DEEPSEEK}),
}


def run_vllm(folder: Path, variables: Mapping[str, str]) -> str:
    """Generate with two ranks."""
    config = {
        "use_async": True,
        "step_interval": INTERVAL,
        "window_size": INTERVAL // 3,
        "num_redundant_experts": NUM_REDUNDANT,
    }
    model = vllm_checkpoint.make_checkpoint(folder, size=SERVING_WORK)
    llm = {**OWN_EPLB, "eplb_config": config}
    return vllm.run_engine(model, prompts_of_rounds=PROMPTS, environment=variables, **llm).log


def run_sglang(folder: Path, variables: Mapping[str, str]) -> str:
    """Generate with two ranks."""
    model = sglang_checkpoint.make_checkpoint(folder / "model", SERVING_WORK)
    arguments = sglang.own_eplb(INTERVAL, NUM_REDUNDANT)
    return sglang.run_engine(
        model, folder, ranks=2, arguments=arguments, variables=variables, tokens=96, prompts_of_rounds=PROMPTS
    ).log


RUNS: Mapping[str, Run] = {"vllm": run_vllm, "sglang": run_sglang}


def measure(contender: Contender) -> dict[str, float]:
    """Run once; the slowest rank counts."""
    with tempfile.TemporaryDirectory() as name:
        times = Path(name, "times")
        times.mkdir()
        log = RUNS[contender.engine](Path(name), {**contender.variables, "STEP_TIMES": str(times)})
        ranks = [_figures(file) for file in sorted(times.iterdir())]
    num_rebalances = len(re.findall(contender.moved, log))
    if not num_rebalances:
        raise RuntimeError(f"no rebalance moved experts, so there is nothing to compare:\n{log[-4000:]}")
    return {"rebalances": num_rebalances, **{figure: max(rank[figure] for rank in ranks) for figure in ranks[0]}}


def _figures(file: Path) -> dict[str, float]:
    lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()[WARM_UP:]]
    walls, cpus = ([int(line[column]) / 1e6 for line in lines] for column in (0, 1))
    return {
        "steps": len(walls),
        "longest_wall_ms": max(walls),
        "longest_cpu_ms": max(cpus),
        "interval_wall_ms": sum(walls) * INTERVAL / len(walls),
        "interval_cpu_ms": sum(cpus) * INTERVAL / len(cpus),
        "median_us": statistics.median(walls) * 1e3,
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    venvs = {"vllm": vllm.VENV_VARIABLE, "sglang": sglang.VENV_VARIABLE}
    names = [name for name, contender in CONTENDERS.items() if os.environ.get(venvs[contender.engine])]
    if not names:
        parser.error(f"set {' or '.join(venvs.values())} to an environment that `make test-engines` has made")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.pairs):
        for name in names:
            runs[name].append(measure(CONTENDERS[name]))
    result: dict[str, Any] = {
        name: {figure: statistics.median(run[figure] for run in of) for figure in of[0]} for name, of in runs.items()
    }
    report(result, args.json)


if __name__ == "__main__":
    main()
