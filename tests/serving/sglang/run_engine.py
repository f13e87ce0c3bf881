"""Start an SGLang engine, generate greedily, shut it down and print what came out as one line of JSON.

A script for the Python of the engine's virtual environment. Its one argument is JSON: `engine` are the keyword
arguments of `sglang.Engine`, `rounds` the prompts of each round, lists of token ids, which make one batch, and `tokens`
how many to generate for each.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import sglang


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job; its outcome has the tokens of each round and prompt, and how long each part took."""
    start = time.perf_counter()
    engine = sglang.Engine(**job["engine"])
    outcome: dict[str, Any] = {"startup_s": time.perf_counter() - start, "round_s": [], "tokens": []}
    sampling = {"max_new_tokens": job["tokens"], "temperature": 0.0, "ignore_eos": True}
    try:
        for prompts in job["rounds"]:
            start = time.perf_counter()
            answers = engine.generate(input_ids=prompts, sampling_params=sampling)
            outcome["round_s"].append(time.perf_counter() - start)
            outcome["tokens"].append([answer["output_ids"] for answer in answers])
    finally:
        engine.shutdown()
    return outcome


if __name__ == "__main__":  # the engine's processes import this file anew
    # When no other process writes any more, so that nothing gets between the letters of the line.
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
