"""What a replay costs beside the generation it checks: CPU seconds over CPU seconds, at several batch sizes.

A generation shares each step's weights among its batch; a replay reads a whole text at once, so it costs the same
whatever the batch was. CPU time is the whole process's: the engine's thread, its event loop, every kernel thread.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from node.engine.engine import TorchEngine
from node.engine.replay import TorchReplayer
from node.ports import EngineRequest, ReplayRequest, Sampling
from protocol.options import JobOptions
from protocol.transcript import Row

AIMS: Final = {1: 0.06, 8: 0.15, 16: 0.22}
"""Batch size -> largest share of the generation's CPU time that its replay should take, in bf16."""

PROMPT_TOKENS: Final = 64
"""Length of each prompt. Unit: tokens. Read once by either side."""

HOW: Final = Sampling(800_000, 950_000)


async def measure_cost(
    model_dir: Path,
    dtype: str = "bf16",
    batches: Sequence[int] = (1, 8, 16),
    tokens: int = 256,
    repeats: int = 3,
    threads: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Per batch size: CPU ms per output token of both sides, their ratio (median of `repeats`) and the aim.

    The two sides take turns, so that another process's moment meets both. Raises: ModelError.
    """
    engine = TorchEngine(model_dir, dtype, slots=max(batches), threads=threads)
    replayer = TorchReplayer(model_dir, dtype, threads=threads)
    result: dict[str, Any] = {}
    await engine.start()
    await replayer.start()
    try:
        vocab = engine.vocab_size
        for batch in batches:
            say(f"replay cost, {model_dir.name} in {dtype}, batch {batch}")
            pairs = [await _pair(engine, replayer, vocab, batch, tokens, repeat) for repeat in range(repeats)]
            made, looked = zip(*pairs, strict=True)
            ratio = statistics.median(replay / generation for generation, replay in pairs)
            aim = AIMS.get(batch) if dtype == "bf16" else None
            result[str(batch)] = {
                "generation_cpu_ms": round(1000 * statistics.median(made), 4),
                "replay_cpu_ms": round(1000 * statistics.median(looked), 4),
                "ratio": round(ratio, 4),
                "aim": aim,
                "met": None if aim is None else ratio <= aim,
            }
    finally:
        await replayer.stop()
        await engine.stop()
    return result


async def _pair(
    engine: TorchEngine, replayer: TorchReplayer, vocab: int, batch: int, tokens: int, number: int
) -> tuple[float, float]:
    """CPU seconds per output token of a batch's generation, and of the replays of its streams."""
    requests = [_request(vocab, tokens, 1000 * number + i) for i in range(batch)]
    started = time.process_time()
    outputs = await asyncio.gather(*(_generate(engine, request) for request in requests))
    generated = time.process_time()
    for request, rows in zip(requests, outputs, strict=True):
        await replayer.replay(ReplayRequest(request.prompt, rows, request.seed, request.sampling, request.options))
    done = sum(len(rows) for rows in outputs)
    return (generated - started) / done, (time.process_time() - generated) / done


def _request(vocab: int, tokens: int, number: int) -> EngineRequest:
    rng = random.Random(number)
    prompt = tuple(rng.randrange(vocab) for _ in range(PROMPT_TOKENS))
    return EngineRequest(prompt, rng.randbytes(32), tokens, HOW, JobOptions(min_tokens=0))


async def _generate(engine: TorchEngine, request: EngineRequest) -> tuple[Row, ...]:
    async with aclosing(await engine.submit(request)) as stream:
        return tuple([Row(token.token_id, token.logprob, token.projection, token.routing) async for token in stream])
