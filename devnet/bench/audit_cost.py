"""What a replay costs beside the generation it checks: CPU seconds over CPU seconds, at several batch sizes.

A generation shares each step's weights among its batch; a replay reads a whole text at once, so it costs the same
whatever the batch was. CPU time is the whole process's: the engine's thread, its event loop, every kernel thread.

`profile_cost` says where a replay's time goes, and what the matrix products alone take at the speed of the fastest of
them: no replay can be cheaper, and where a model's weights fit in the processor's cache no batch is needed to reach
that speed, so that a small model's ratio is bounded by it.
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

import torch

from node.engine.compiled import kernels_for, make_sampler, open_decoder
from node.engine.decoder import Batch, Segment
from node.engine.engine import TorchEngine
from node.engine.replay import LOGIT_NUMBERS, LOGIT_ROWS, READ_TOKENS, TorchReplayer
from node.engine.sampler import Draw
from node.engine.spec import load_spec
from node.engine.weights import TORCH_DTYPES
from node.ports import EngineRequest, ReplayRequest, Sampling
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


def profile_cost(model_dir: Path, dtype: str = "bf16", tokens: int = 320) -> dict[str, float]:
    """Milliseconds of one thread's CPU per token read, by part. Raises: ModelError.

    `forward`: all layers; `head`: the logits; `vocabulary`: log-probability, margin and gap; `products_at_best`: all
    matrix products, were each as fast as the head's.
    """
    torch.set_num_threads(1)
    spec, device = load_spec(model_dir), torch.device("cpu")
    with torch.inference_mode():
        kernels = kernels_for("auto", spec, TORCH_DTYPES[dtype], device, 1, None)
        decoder = open_decoder(model_dir, spec, dtype, device, 1, tokens, 0, kernels)
        sampler = make_sampler(spec.vocab, spec.hidden, device, kernels)
        ids = [i * 7 % spec.vocab for i in range(tokens)]
        parts = [Segment(0, at, tuple(ids[at : at + READ_TOKENS])) for at in range(0, tokens, READ_TOKENS)]
        rows = max(LOGIT_ROWS, LOGIT_NUMBERS // spec.vocab)
        hidden = decoder.forward(Batch([], [], [], parts[:1])).hidden[:rows]
        logits, chosen = decoder.logits(hidden), torch.tensor(ids[: len(hidden)])
        draws = [Draw.at(bytes(32), at, HOW.temperature_micro, HOW.top_p_micro, 0) for at in range(len(hidden))]

        def look() -> None:
            sampler.logprobs(logits, chosen)
            sampler.look_back(logits, chosen, draws)

        forward = _cpu_ms(lambda: [decoder.forward(Batch([], [], [], [part])) for part in parts]) / tokens
        head = _cpu_ms(lambda: decoder.logits(hidden)) / len(hidden)
        vocabulary = _cpu_ms(look) / len(hidden)
    best = head * (1 + spec.body_parameters / spec.head_parameters)
    named = {"forward": forward, "head": head, "vocabulary": vocabulary, "products_at_best": best}
    return {name: round(value, 4) for name, value in named.items()}


def _cpu_ms(call: Callable[[], object], rounds: int = 7) -> float:
    """The least CPU time of some calls."""
    call()
    taken = []
    for _ in range(rounds):
        started = time.thread_time()
        call()
        taken.append(time.thread_time() - started)
    return 1000 * min(taken)


def _request(vocab: int, tokens: int, number: int) -> EngineRequest:
    rng = random.Random(number)
    prompt = tuple(rng.randrange(vocab) for _ in range(PROMPT_TOKENS))
    return EngineRequest(prompt, rng.randbytes(32), tokens, HOW)


async def _generate(engine: TorchEngine, request: EngineRequest) -> tuple[Row, ...]:
    async with aclosing(await engine.submit(request)) as stream:
        return tuple([Row(token.token_id, token.logprob, token.projection, token.routing) async for token in stream])
