"""A child process that runs streams when told to: one JSON line in, one JSON line out, until its input ends.

`python -m devnet.bench.worker engine MODEL_DIR` drives the bare engine, `... http URL` the gateway (its API key comes
in the environment). Both have the same loop around them, so that the loop is on both sides of a ratio.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from devnet.bench.workload import SAMPLING, SLOTS, TEMPERATURE, TOP_P, Sample
from devnet.http_client import OpenAIClient, RequestFailed
from protocol.errors import TallyError

KEY_VARIABLE: Final = "TALLY_BENCH_KEY"
LINE_LIMIT: Final = 16 << 20
"""Longest order. Unit: bytes. Sixteen streams of a few prompts take some 50 KiB."""

One = Callable[[str, int], Awaitable[tuple[int, int, float]]]
"""(prompt, most output tokens) -> (prompt tokens, output tokens, seconds to the first)."""


class WorkerFailed(TallyError):
    """A worker ended or could not run what it was told."""


async def run_streams(one: One, streams: list[list[str]], max_tokens: int) -> Sample:
    """All streams at once, each its requests in turn; from the first request to the last token."""
    sample = Sample(0, 0.0, [])

    async def stream(texts: list[str]) -> None:
        for text in texts:
            read, written, first = await one(text, max_tokens)
            sample.prompt_tokens += read
            sample.tokens += written
            sample.first_s.append(first)

    start = time.perf_counter()
    await asyncio.gather(*(stream(texts) for texts in streams))
    sample.seconds = time.perf_counter() - start
    return sample


@asynccontextmanager
async def bare_engine(model_dir: Path) -> AsyncIterator[One]:
    """The provider's engine with the provider's options, and nothing around it."""
    from node.engine.card import load_card
    from node.engine.engine import TorchEngine
    from node.gateway.text import TextCodec
    from node.ports import EngineRequest

    engine = TorchEngine(model_dir, "auto", SLOTS)
    await engine.start()
    codec = TextCodec(load_card(model_dir, "bench", engine.profile, engine.max_context))

    async def one(text: str, max_tokens: int) -> tuple[int, int, float]:
        ids = codec.encode_text(text)
        written, first, start = 0, 0.0, time.perf_counter()
        async for _ in await engine.submit(EngineRequest(ids, os.urandom(32), max_tokens, SAMPLING)):
            first = first or time.perf_counter() - start
            written += 1
        return len(ids), written, first

    try:
        yield one
    finally:
        await engine.stop()


@asynccontextmanager
async def gateway(url: str, model: str) -> AsyncIterator[One]:
    """The OpenAI API, streamed."""
    async with OpenAIClient(url, os.environ[KEY_VARIABLE]) as client:

        async def one(text: str, max_tokens: int) -> tuple[int, int, float]:
            body = {"model": model, "prompt": text, "max_tokens": max_tokens}
            reply = await client.complete("/completions", {**body, "temperature": TEMPERATURE, "top_p": TOP_P})
            usage = reply.usage
            return int(usage["prompt_tokens"]), int(usage["completion_tokens"]), reply.first_s

        yield one


async def serve(one: One) -> None:
    """Orders from standard input to its end; says `ready` first."""
    reader = asyncio.StreamReader(LINE_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps({"ready": True}), flush=True)
    while line := await reader.readline():
        order: dict[str, Any] = json.loads(line)
        try:
            answer = asdict(await run_streams(one, order["streams"], order["max_tokens"]))
        except RequestFailed as exc:
            answer = {"error": str(exc)}
        print(json.dumps(answer), flush=True)


async def main(kind: str, *arguments: str) -> None:
    """`engine MODEL_DIR` or `http URL MODEL`."""
    made = bare_engine(Path(arguments[0])) if kind == "engine" else gateway(*arguments)
    async with made as one:
        await serve(one)


class Worker:
    """The parent's end. `async with Worker("engine", DIR) as worker`."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self._arguments = arguments
        self._env = env or {}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def __aenter__(self) -> Worker:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "devnet.bench.worker",
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self._env, "HF_HUB_OFFLINE": "1"},
        )
        await self._read()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """The end of its input ends it."""
        process = self._process
        assert process is not None and process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def run(self, streams: list[list[str]], max_tokens: int) -> Sample:
        """Raises: WorkerFailed."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps({"streams": streams, "max_tokens": max_tokens}).encode() + b"\n")
        await self._process.stdin.drain()
        return Sample(**await self._read())

    async def _read(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise WorkerFailed(f"the {self._arguments[0]} worker ended; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"the {self._arguments[0]} worker: {answer['error']}")
        return answer


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
