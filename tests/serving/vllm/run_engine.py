"""Runs vLLM once: load, generate tokens greedily for some rounds, print one line of JSON, end.

Run by the Python of the engine's environment, with one argument, an object in JSON: `llm` (keyword arguments of
`vllm.LLM`), `rounds` (the prompts of each: lists of token ids) and `num_tokens`. Everything but the result goes to
stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Print the tokens of every round, the maps before and after them, and what it all took."""
    result_fd = _keep_stdout_for_the_result()
    request = json.loads(sys.argv[1])
    began = time.perf_counter()
    from vllm import LLM

    llm = LLM(worker_extension_cls="vllm_on_cpu.probe.Probe", **request["llm"])
    result: dict[str, Any] = {"load_s": time.perf_counter() - began, "tokens": [], "round_s": []}
    result["maps"] = [llm.collective_rpc("probe_maps")]
    for prompts in request["rounds"]:
        began = time.perf_counter()
        result["tokens"].append(_generate(llm, prompts, request["num_tokens"]))
        result["round_s"].append(time.perf_counter() - began)
        result["maps"].append(llm.collective_rpc("probe_maps"))
    llm.llm_engine.engine_core.shutdown()
    with os.fdopen(result_fd, "w") as stdout:
        stdout.write(json.dumps(result) + "\n")


def _keep_stdout_for_the_result() -> int:
    """Let the descriptor of stdout, to which the engine's processes log, be stderr; return what it was."""
    result_fd = os.dup(1)
    os.dup2(2, 1)
    return result_fd


def _generate(llm: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=num_tokens, temperature=0, detokenize=False, ignore_eos=True)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main()
