"""A platform outside, as OpenRouter and its like: prices at /models, text in and out. The outside world is faked."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

Row = dict[str, Any]


def priced(name: str, prompt: str, completion: str, **changes: Any) -> Row:
    """A model as a platform lists it; prices in USD per token."""
    row = {"id": name, "context_length": 4096, "pricing": {"prompt": prompt, "completion": completion, "request": "0"}}
    return {**row, **changes}


@dataclass
class FakePlatform:
    """`async with FakePlatform(rows) as platform`; `platform.url` is its base. Knobs may be turned while it runs."""

    rows: list[Row]
    pieces: tuple[str, ...] = ("Hello", " from", " outside", ".")
    finish: str | None = "stop"
    usage: dict[str, Any] | None = field(default_factory=lambda: {"prompt_tokens": 11, "completion_tokens": 5})
    refuses: int = 0
    breaks_after: int | None = None
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    sheets_read: int = 0
    key: str = ""
    url: str = ""
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/api/v1/models", self._models)
        app.router.add_post("/api/v1/chat/completions", self._answer)
        app.router.add_post("/api/v1/completions", self._answer)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/api/v1"  # type: ignore[attr-defined]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _models(self, request: web.Request) -> web.Response:
        self.sheets_read += 1
        return web.json_response({"data": self.rows})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append((request.path.removeprefix("/api/v1"), body))
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "who are you?"}}, status=401)
        if self.refuses:
            return web.json_response({"error": {"message": "not this prompt"}}, status=self.refuses)
        chat = "messages" in body
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for index, piece in enumerate(self.pieces):
            if index == self.breaks_after:
                assert request.transport is not None
                await response.drain()
                request.transport.close()
                return response
            choice = {"delta": {"content": piece}} if chat else {"text": piece}
            await self._event(response, {"choices": [{"index": 0, **choice, "finish_reason": None}]})
        if self.finish is not None:
            last = {"delta": {}} if chat else {"text": ""}
            await self._event(response, {"choices": [{"index": 0, **last, "finish_reason": self.finish}]})
        if self.usage is not None:
            await self._event(response, {"choices": [], "usage": self.usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _event(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b": OPENROUTER PROCESSING\n\ndata: " + json.dumps(event).encode() + b"\n\n")
