"""A running gateway for a test, a clock that tests move, and a raw socket to misbehave on."""

from __future__ import annotations

import asyncio
import json
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAI
from tokenizers import Tokenizer

from node.gateway.auth import ApiKeys
from node.gateway.limits import Limits
from node.gateway.server import GatewayServer
from node.gateway.text import TextCodec
from node.ports import Clock, Marketplace
from tests.node.gateway import cards
from tests.twins.wall_clock import WallClock


class ManualClock:
    """Time stands still until a test moves it."""

    def __init__(self) -> None:
        self._now = 1_800_000_000.0
        self._sleepers: list[tuple[float, float, asyncio.Future[None]]] = []
        self._slept = asyncio.Condition()

    def now_ms(self) -> int:
        return int(self._now * 1000)

    def monotonic(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            return
        until: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (self._now + seconds, seconds, until)
        self._sleepers.append(entry)
        try:
            async with self._slept:
                self._slept.notify_all()
            await until
        finally:
            if entry in self._sleepers:
                self._sleepers.remove(entry)

    async def sleeping(self, seconds: float) -> None:
        """Return once somebody sleeps for just so long."""
        async with self._slept:
            await self._slept.wait_for(lambda: any(length == seconds for _, length, _ in self._sleepers))

    async def stuck(self, seconds: float) -> None:
        """Return once somebody has slept for just so long through many turns of the loop: nothing else moves."""
        turns = 0
        before: object = None
        while turns < 200:
            await asyncio.sleep(0)
            now = next((until for _, length, until in self._sleepers if length == seconds), None)
            turns = turns + 1 if now is not None and now is before else 0
            before = now

    async def advance(self, seconds: float) -> None:
        self._now += seconds
        due = [entry for entry in self._sleepers if entry[0] <= self._now]
        for entry in due:
            # Gone at once, so that `sleeping` waits for the next sleeper and not for this one's leaving.
            self._sleepers.remove(entry)
            if not entry[2].done():
                entry[2].set_result(None)


class Seeded:
    """Entropy that counts, so that a test can be run again."""

    def __init__(self) -> None:
        self._count = 0

    def token(self, size: int) -> bytes:
        self._count += 1
        return self._count.to_bytes(4, "big").rjust(size, b"\5")[-size:]


@dataclass
class Served:
    """A gateway and a key for it."""

    server: GatewayServer
    port: int
    key: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> AsyncOpenAI:
        http = DefaultAsyncHttpxClient(verify=_tls())
        return AsyncOpenAI(
            **({"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0, "http_client": http} | options)
        )

    def sync_client(self, **options: Any) -> OpenAI:
        return OpenAI(**({"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0} | options))

    async def post(self, body: bytes, path: str = "/v1/chat/completions", **headers: str | None) -> Answer:
        """One request by hand; a header given as None is left out. Underscores in names stand for dashes."""
        sent: dict[str, str | None] = {
            "Host": f"127.0.0.1:{self.port}",
            "Authorization": f"Bearer {self.key}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in sent.items() if value is not None)
        return await self.raw(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)

    async def raw(self, data: bytes) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            await writer.drain()
            return await read_answer(reader)
        finally:
            writer.close()


@dataclass
class Answer:
    """A raw answer. `body`: after the head, chunked framing left in."""

    status: int
    head: str
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found = self.json()["error"]
        assert set(found) >= {"message", "type", "param", "code"}
        assert isinstance(found, dict)
        return found


def unchunked(answer: Answer) -> Any:
    """The JSON of an answer that came in chunks."""
    rest, whole = answer.body, b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        whole += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return json.loads(whole)


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    return Answer(int(head.split()[1]) if head else 0, head.decode(), body)


@asynccontextmanager
async def serving(
    market: Marketplace, *, clock: Clock | None = None, limits: Limits | None = None, **options: Any
) -> AsyncIterator[Served]:
    clock = clock or WallClock()
    entropy = Seeded()
    with tempfile.TemporaryDirectory() as folder:
        keys = ApiKeys(Path(folder) / "keys.json", clock=clock, entropy=entropy)
        key = keys.create("test")
        limits = limits or Limits(stop_s=0.0)
        server = GatewayServer(market, port=0, api_keys=keys, clock=clock, entropy=entropy, limits=limits, **options)
        port = await server.start()
        try:
            yield Served(server, port, key)
        finally:
            await server.stop()


def ids(text: str) -> tuple[int, ...]:
    """What a provider would generate to say `text`."""
    return _codec().encode_text(text)


def end_id() -> int:
    return cards.card().eos_ids[0]


def shown(prompt: tuple[int, ...]) -> str:
    """A prompt with its control tokens written out."""
    tokenizer = Tokenizer.from_str(cards.byte_level_json().decode())
    return str(tokenizer.decode(list(prompt), skip_special_tokens=False))


@cache
def _tls() -> ssl.SSLContext:
    """Made once: each client would load the system's certificates anew, for plain HTTP."""
    return ssl.create_default_context()


@cache
def _codec() -> TextCodec:
    return TextCodec(cards.card())
