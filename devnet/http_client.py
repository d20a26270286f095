"""The demo's and the benchmarks' OpenAI client: one streamed request over plain HTTP, with what it saw and when."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from protocol.errors import TallyError


class RequestFailed(TallyError):
    """The gateway answered with an error, or the stream ended with one."""


@dataclass(slots=True)
class Reply:
    """One answer. `first_s`, `total_s`: seconds from sending. `usage`: the last chunk's, with its `tally` part."""

    text: str = ""
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    provider: str = ""
    job: str = ""
    first_s: float = 0.0
    total_s: float = 0.0


class OpenAIClient:
    """`async with OpenAIClient(url, key) as client`. `url` ends in /v1."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> OpenAIClient:
        self._http = aiohttp.ClientSession(headers=self._headers, timeout=aiohttp.ClientTimeout(total=120))
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._http is not None
        await self._http.close()

    async def models(self) -> list[str]:
        """Ids of /v1/models. Raises: RequestFailed."""
        assert self._http is not None
        async with self._http.get(f"{self._url}/models") as answer:
            if answer.status != 200:
                raise RequestFailed(f"/models answered {answer.status}: {await answer.text()}")
            return [entry["id"] for entry in (await answer.json())["data"]]

    async def stream(self, path: str, body: dict[str, Any], reply: Reply) -> AsyncIterator[str]:
        """Pieces of text as they come; `reply` is filled in on the way. Closing the iterator hangs up.

        Raises: RequestFailed, also when the stream ends without a finish reason: that is never a success.
        """
        assert self._http is not None
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        start = time.perf_counter()
        async with self._http.post(f"{self._url}{path}", json=body) as answer:
            if answer.status != 200:
                raise RequestFailed(f"{path} answered {answer.status}: {await answer.text()}")
            reply.provider = answer.headers.get("x-tally-provider", "")
            reply.job = answer.headers.get("x-tally-job", "")
            async for line in answer.content:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                piece = _take(json.loads(line[6:]), reply)
                if piece:
                    reply.first_s = reply.first_s or time.perf_counter() - start
                    yield piece
        reply.total_s = time.perf_counter() - start
        if not reply.finish_reason:
            raise RequestFailed("the stream ended without a finish reason")

    async def complete(self, path: str, body: dict[str, Any]) -> Reply:
        """The whole answer. Raises: RequestFailed."""
        reply = Reply()
        async for _ in self.stream(path, body, reply):
            pass
        return reply


def _take(chunk: dict[str, Any], reply: Reply) -> str:
    """Put one chunk into the reply; returns its text. Raises: RequestFailed for an error inside the stream."""
    if "error" in chunk:
        raise RequestFailed(f"error inside the stream: {chunk['error'].get('message')}")
    if chunk.get("usage"):
        reply.usage = chunk["usage"]
    piece = ""
    for choice in chunk.get("choices", ()):
        piece += choice.get("text") or choice.get("delta", {}).get("content") or ""
        reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
    reply.text += piece
    return piece
