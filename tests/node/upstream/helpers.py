"""Engines on fake servers, and what tests ask of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from node.ports import EngineRequest, EngineToken, Sampling, Urgency
from node.system import SystemClock
from node.upstream.engine import ModelTexts, UpstreamEngine
from node.upstream.settings import UpstreamSettings
from protocol.options import NO_OPTIONS, JobOptions
from tests.node.upstream.servers import FakeServer
from tests.node.upstream.words import BOS, EOS, encode, tokenizer_json
from tests.twins.engine_twin import profile

GREEDY = Sampling(temperature_micro=0)
PROMPT = tuple(encode("the story of a thing"))


@asynccontextmanager
async def serving(
    server: FakeServer, *, tokenizer: bytes | None = None, eos: tuple[int, ...] = (EOS,), **settings: object
) -> AsyncIterator[UpstreamEngine]:
    """A started engine over `server`. `settings`: of UpstreamSettings."""
    engine = UpstreamEngine(
        replace(UpstreamSettings(server.url), **settings),  # type: ignore[arg-type]
        ModelTexts(tokenizer or tokenizer_json(), eos, BOS, 4096),
        lambda able: profile(b"upstream:" + able.model.encode()),
        SystemClock(),
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def ask(
    max_tokens: int = 8,
    prompt: tuple[int, ...] = PROMPT,
    sampling: Sampling = GREEDY,
    options: JobOptions = NO_OPTIONS,
    seed: int = 1,
    urgency: Urgency = Urgency.STANDARD,
) -> EngineRequest:
    return EngineRequest(prompt, bytes([seed]) * 32, max_tokens, sampling, options, urgency)


async def tokens(engine: UpstreamEngine, request: EngineRequest) -> list[EngineToken]:
    async with aclosing(await engine.submit(request)) as stream:
        return [token async for token in stream]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds; fails after 10 s."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
