"""Serves with two data-parallel engine cores of vLLM, and prints one line of JSON with what was seen after each act.

Run by the Python of the engine's environment, with one argument, an object in JSON: `engine` (keyword arguments of
`vllm.AsyncEngineArgs`) and `acts` (of :data:`ACTS`). Everything but the result goes to stderr.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from dp_model import VOCABULARY, Weights

_PROMPT_LENGTH = 8
_NUM_REQUESTS = 6
_NUM_TOKENS = 100
_MOMENT_S = 0.5
_STANDSTILL_S = 6.0
"""Longer than the rebalance waits for a late vote."""
_NUM_TRIES = 4
_MAX_WAVES = 40


class Serving:
    """The engine, and requests with the tokens that they should get.

    Args:
        engine: vLLM's frontend.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.tokens: list[dict[str, list[int]]] = []
        self.draw = random.Random(0)
        self._weights = Weights()

    async def look(self) -> dict[str, Any]:
        """What the workers of both ranks say, and whether the loops of their engine cores run."""
        client = self.engine.engine_core
        return {
            "ranks": [of_rank[0] for of_rank in await client.call_utility_all_async("collective_rpc", "look")],
            "has_work": await client.call_utility_all_async("has_work"),
        }

    async def stand(self) -> dict[str, Any]:
        """Wait until no loop runs and none has run since the look before: ranks answer one after the other."""
        seen = await self.look()
        while True:
            await asyncio.sleep(_MOMENT_S)
            before, seen = seen, await self.look()
            if seen == before and not any(seen["has_work"]):
                return seen

    async def stand_still(self, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """Wait until no loop runs, and look again after a while.

        A request that reached an engine core after the wave it was sent for can start another one, which is over after
        a step; then this begins anew.
        """
        for _ in range(_NUM_TRIES):
            before = await self.stand()
            await asyncio.sleep(seconds)
            after = await self.look()
            if after["ranks"] == before["ranks"]:
                break
        return before, after

    async def request(self, rank: int, num_tokens: int = _NUM_TOKENS, begun: asyncio.Event | None = None) -> list[int]:
        """Have one rank generate tokens; they are kept with those that are right."""
        from vllm import SamplingParams

        prompt = [self.draw.randrange(3, VOCABULARY) for _ in range(_PROMPT_LENGTH)]
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0, detokenize=False, ignore_eos=True)
        name = f"request {len(self.tokens)}"
        kept = {"wanted": self._weights.generate(prompt, num_tokens), "got": []}
        self.tokens.append(kept)
        stream = self.engine.generate({"prompt_token_ids": prompt}, sampling, name, data_parallel_rank=rank)
        async for output in stream:
            kept["got"] = list(output.outputs[0].token_ids)
            if begun is not None and len(kept["got"]) > 1:
                begun.set()
        return kept["got"]

    async def requests(self, rank: int, num_tokens: int = _NUM_TOKENS) -> None:
        """Some requests at a time on one rank."""
        await asyncio.gather(*(self.request(rank, num_tokens) for _ in range(_NUM_REQUESTS)))


async def serve_one_rank(serving: Serving, rank: int) -> list[dict[str, Any]]:
    """One rank has requests, the other one none; then both loops end."""
    await serving.requests(rank)
    return [await serving.stand()]


async def end_waves(serving: Serving) -> list[dict[str, Any]]:
    """Short waves until one ends amid an epoch, and the loops stand still; then a wave on one rank only."""
    ended = stood = await serving.stand()
    for _ in range(_MAX_WAVES):
        await serving.requests(1, serving.draw.randrange(8, 40))
        if (await serving.stand())["ranks"][0]["state"] != "IDLE":
            ended, stood = await serving.stand_still(_STANDSTILL_S)
            if ended["ranks"][0]["state"] != "IDLE":
                break
    await serving.requests(0)
    return [ended, stood, await serving.stand()]


async def pause(serving: Serving, mode: str) -> list[dict[str, Any]]:
    """Pause while a rank generates, stand still while the other one gets a request, and resume."""
    begun = asyncio.Event()
    running = asyncio.create_task(serving.request(0, begun=begun))
    await begun.wait()
    first = len(serving.tokens) - 1
    await serving.engine.pause_generation(mode=mode)
    late = asyncio.create_task(serving.request(1))
    paused, stood = await serving.stand_still(2 * _MOMENT_S)
    lengths = [len(kept["got"]) for kept in serving.tokens[first:]]
    await serving.engine.resume_generation()
    await asyncio.gather(running, late)
    lengths += [len(kept["got"]) for kept in serving.tokens[first:]]
    return [{**paused, "lengths": lengths}, stood, await serving.stand()]


ACTS: dict[str, Callable[..., Awaitable[Sequence[dict[str, Any]]]]] = {
    "serve_one_rank": serve_one_rank,
    "end_waves": end_waves,
    "pause": pause,
}


async def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Start the engine, and act."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**request["engine"]))
    try:
        serving = Serving(engine)
        seen = [await serving.look()]
        acts = [await ACTS[name](serving, *arguments) for name, *arguments in request["acts"]]
        core = type(engine.engine_core).__name__
        return {"client": core, "start": seen[0], "acts": acts, "tokens": serving.tokens}
    finally:
        engine.shutdown(timeout=60)


def main() -> None:
    """Print what was seen."""
    result_fd = os.dup(1)
    os.dup2(2, 1)  # what the engine's processes print is no result
    result = asyncio.run(serve(json.loads(sys.argv[1])))
    with os.fdopen(result_fd, "w") as stdout:
        stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
