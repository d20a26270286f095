"""Scheduling: company, chunks, cancellations and late arrivals change nothing; slots, queue and back-pressure."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from node.engine.decoder import Decoder
from node.engine.engine import EngineError, TorchEngine
from node.engine.generation import RESUME_AT, RUN_AHEAD, Generation
from node.engine.sampler import Sampler
from node.engine.scheduler import PREFILL_TOKENS, Scheduler
from node.engine.spec import load_spec
from node.engine.weights import load_weights
from node.ports import EngineFull, EngineRequest, EngineToken, Sampling
from protocol.errors import LocalProtocolError
from protocol.options import JobOptions
from protocol.units import FinishReason
from tests.node.engine.conftest import StartEngine

WARM = Sampling(900_000, 950_000, 0)


def seed(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest()


def request(number: int, length: int, count: int, vocab: int = 100, sampling: Sampling = WARM) -> EngineRequest:
    rng = random.Random(number)
    return EngineRequest(tuple(rng.randrange(1, vocab) for _ in range(length)), seed(number), count, sampling)


async def run(engine: TorchEngine, asked: EngineRequest) -> list[int]:
    return [token.token_id async for token in await engine.submit(asked)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "schedule"), [("shipped", 0), ("llama", 1), ("llama", 2), ("mixtral", 3), ("qwen3", 4)]
)
async def test_no_schedule_changes_the_text(name: str, schedule: int, start_engine: StartEngine) -> None:
    """Streams arrive late, in any order, some are cancelled midway; each of the rest says what it says alone."""
    rng = random.Random(schedule)
    crowd = await start_engine(name, slots=3)
    alone = await start_engine(name, slots=1)
    asked = [request(100 * schedule + i, rng.choice([1, 3, 30, 400]), rng.choice([2, 20, 50])) for i in range(8)]
    quitters = {i: rng.randrange(1, 6) for i in rng.sample(range(8), 3)}
    order = rng.sample(range(8), 8)
    taken: dict[int, list[int]] = {}

    async def consume(i: int, after: asyncio.Event | None, started: asyncio.Event) -> None:
        if after is not None:
            await after.wait()
        taken[i] = []
        async with aclosing(await crowd.submit(asked[i])) as stream:
            async for token in stream:
                taken[i].append(token.token_id)
                started.set()
                if len(taken[i]) == quitters.get(i):
                    break
        started.set()

    events = [asyncio.Event() for _ in order]
    waits = [events[rng.randrange(k)] if k > 2 else None for k in range(8)]
    await asyncio.gather(*(consume(i, waits[k], events[k]) for k, i in enumerate(order)))
    assert crowd.stats().active == crowd.stats().queued == 0
    for i, got in taken.items():
        assert got == (await run(alone, asked[i]))[: len(got)]


@pytest.mark.parametrize("name", ["shipped", "qwen3"])
async def test_another_engine_continues_exactly_from_any_cut(name: str, start_engine: StartEngine) -> None:
    """Prompt plus what was delivered, the same seed: the rest of the text is the one the first engine wrote."""
    first, second = await start_engine(name), await start_engine(name)
    asked = request(5, 20, 40)
    whole = await run(first, asked)

    async def rest(cut: int) -> list[int]:
        left = EngineRequest((*asked.prompt, *whole[:cut]), asked.seed, asked.max_tokens - cut, asked.sampling)
        return await run(second, left)

    cuts = range(0, len(whole), 2)
    for cut, got in zip(cuts, await asyncio.gather(*map(rest, cuts)), strict=True):
        assert whole[:cut] + got == whole


async def test_aclose_frees_the_slot_and_the_queue_place(start_engine: StartEngine) -> None:
    engine = await start_engine("endless", slots=1, max_queue=1)
    running, queued = await engine.submit(request(1, 4, 400)), await engine.submit(request(2, 4, 5))
    await anext(running)
    assert (engine.stats().active, engine.stats().queued) == (1, 1)
    with pytest.raises(EngineFull, match="1 slots are taken and 1 .* up to 1 of 1 queue"):
        await engine.submit(request(3, 4, 5))
    await queued.aclose()
    assert (engine.stats().active, engine.stats().queued) == (1, 0)
    await running.aclose()
    await running.aclose()
    assert engine.stats().active == 0
    with pytest.raises(StopAsyncIteration):
        await anext(running)
    assert len(await run(engine, request(3, 4, 5))) <= 5


async def test_a_cancelled_consumer_frees_its_slot(start_engine: StartEngine) -> None:
    engine = await start_engine("endless", slots=1)

    async def consume() -> None:
        async with aclosing(await engine.submit(request(1, 4, 400, sampling=Sampling(0)))) as stream:
            async for _ in stream:
                arrived.set()

    arrived = asyncio.Event()
    task = asyncio.create_task(consume())
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.stats().active == 0


async def test_a_dropped_stream_frees_its_slot(start_engine: StartEngine) -> None:
    engine = await start_engine("endless", slots=1)
    stream = await engine.submit(request(1, 4, 400))
    await anext(stream)
    del stream
    gc.collect()
    assert await run(engine, request(2, 4, 3))  # gets the only slot
    assert engine.stats().active == 0


async def test_a_slow_consumer_pauses_only_itself(start_engine: StartEngine) -> None:
    """At most RUN_AHEAD tokens are made beyond those taken; taking down to RESUME_AT starts it again."""
    engine = await start_engine("endless", slots=2)
    slow = request(1, 4, 300)
    expected = await run(engine, slow)
    before = engine.stats().tokens_total
    stream = await engine.submit(slow)
    others = 0
    for number in range(2):
        others += len(await run(engine, request(number, 30, 60)))
    assert others > RUN_AHEAD
    assert engine.stats().tokens_total - before - others == RUN_AHEAD
    got = [(await anext(stream)).token_id for _ in range(RUN_AHEAD - RESUME_AT - 1)]
    others += len(await run(engine, request(9, 30, 60)))
    assert engine.stats().tokens_total - before - others == RUN_AHEAD  # not caught up a whole leaf yet
    got += [token.token_id async for token in stream]
    assert got == expected


def test_long_prompts_are_read_in_chunks_beside_decoding(model_dir: Callable[[str], Path]) -> None:
    """While a prompt of two chunks is read, a running stream gets a token every step; slots stay dense."""
    spec = load_spec(model_dir("endless"))
    cpu = torch.device("cpu")
    with torch.inference_mode():
        decoder = Decoder(spec, load_weights(model_dir("endless"), spec, "fp32", cpu), 3, 512)
        scheduler = Scheduler(decoder, Sampler(spec.vocab, spec.hidden, cpu))
        first, long, late = (Generation(request(i, n, 3), ()) for i, n in enumerate((2, PREFILL_TOKENS + 10, 5)))
        scheduler.submit(first)
        assert [s for s, _ in scheduler.step()] == [first]
        scheduler.submit(long)
        scheduler.submit(late)
        assert [s for s, _ in scheduler.step()] == [first]
        assert [s for s, _ in scheduler.step()] == [first, long, late]
        assert (first.ended, first.slot, scheduler.active) == (True, -1, 2)
        assert {long.slot, late.slot} == {0, 1}
        scheduler.cancel(long)
        scheduler.cancel(long)
        assert (late.slot, scheduler.active) == (0, 1)
        assert [s for s, _ in scheduler.step()] == [late]
        scheduler.cancel_all()
        assert not scheduler.has_work()
        assert scheduler.step() == []


async def test_stop_ids_end_a_stream_after_being_emitted(start_engine: StartEngine) -> None:
    engine = await start_engine("shipped")
    asked = request(3, 10, 30)
    whole = await run(engine, asked)
    stop = whole[4]
    stopped = EngineRequest(asked.prompt, asked.seed, 30, asked.sampling, JobOptions(stop_ids=(stop,)))
    tokens: list[EngineToken] = [token async for token in await engine.submit(stopped)]
    assert [token.token_id for token in tokens] == whole[: whole.index(stop) + 1]
    assert tokens[-1].finish is FinishReason.STOP


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": ()}, "empty"),
        ({"prompt": (101,)}, "token id 101"),
        ({"prompt": (-1,)}, "token id -1"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 64}, "the context holds 64"),
        ({"seed": b"short"}, "32 bytes"),
        ({"sampling": Sampling(-1)}, "temperature"),
        ({"sampling": Sampling(1, 0)}, "top_p"),
    ],
)
async def test_bad_requests_are_refused_at_once(
    changes: dict[str, object], reason: str, start_engine: StartEngine
) -> None:
    engine = await start_engine(max_context=64)
    good: dict[str, object] = {"prompt": (1, 2), "seed": seed(1), "max_tokens": 5}
    with pytest.raises(ValueError, match=reason):
        await engine.submit(EngineRequest(**{**good, **changes}))  # type: ignore[arg-type]
    assert engine.stats().active == engine.stats().queued == 0


async def test_stopping_ends_open_streams_with_an_error(start_engine: StartEngine) -> None:
    engine = await start_engine("endless", slots=1)
    running, queued = await engine.submit(request(1, 4, 400)), await engine.submit(request(2, 4, 5))
    await anext(running)
    await engine.stop()
    await engine.stop()
    for stream in (running, queued):
        with pytest.raises(EngineError):
            async for _ in stream:
                pass
        await stream.aclose()
    with pytest.raises(EngineError):
        await engine.submit(request(3, 4, 5))
    await engine.start()
    assert await run(engine, request(2, 4, 5))


async def test_a_failing_step_reaches_every_stream(start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await start_engine()
    monkeypatch.setattr(engine._decoder, "forward", lambda batch: 1 / 0)
    streams = [await engine.submit(request(i, 4, 5)) for i in range(6)]
    for stream in streams:
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            await anext(stream)
    with pytest.raises(EngineError):
        await engine.submit(request(9, 4, 5))


async def test_use_before_start(model_dir: object, start_engine: StartEngine) -> None:
    engine = await start_engine()
    with pytest.raises(LocalProtocolError):
        await engine.start()
    fresh = TorchEngine(engine._model_dir)
    with pytest.raises(LocalProtocolError):
        _ = fresh.profile
    with pytest.raises(EngineError):
        await fresh.submit(request(1, 4, 5))
    assert fresh.stats().active == 0
