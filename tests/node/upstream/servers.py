"""A completion server of our own making behind a real socket, for what no real one does on demand.

Its model is a hash: logits of a token follow from the text so far, so it is greedy, seeded and biased like a real one.
Two manners of speaking: `names_tokens` as vLLM with its extensions, else text only. Each fault is a switch.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

from tests.node.upstream.words import EOS, WORDS, encode

Pace = Callable[[int], Awaitable[None]]


@dataclass
class FakeServer:
    """`async with FakeServer() as server`; `server.url` ends in /v1. Knobs may be turned while it runs."""

    names_tokens: bool = True
    models: tuple[str, ...] = ("hash-model",)
    max_model_len: int | None = 512
    honours_seed: bool = True
    honours_top_k: bool = True
    honours_min_tokens: bool = True
    scales_logprobs: bool = False
    shows_stop: bool = True
    obeys_schema: bool = False
    adds_bos: bool = False
    dimensions: int = 0
    refuses: int = 0
    says: str = ""
    ends_with: str = ""
    breaks_after: int | None = None
    unnamed_after: int | None = None
    key: str = ""
    padding: int = 0
    pace: Pace | None = None
    hold: asyncio.Event | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    written: int = 0
    running: int = 0
    most_running: int = 0
    left_early: int = 0
    url: str = ""
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_route("*", "/away/models", self._away)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"  # type: ignore[attr-defined]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    # ------------------------------------------------------------------------------------------------------- handlers

    async def _models(self, request: web.Request) -> web.Response:
        self._check(request)
        extra = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [{"id": name, **extra} for name in self.models]})

    async def _away(self, request: web.Request) -> web.Response:
        raise web.HTTPFound(self.says or "http://169.254.169.254/latest/meta-data/")

    async def _embeddings(self, request: web.Request) -> web.Response:
        self._check(request)
        body = await request.json()
        if not self.dimensions:
            return web.json_response({"error": {"message": "no embeddings here"}}, status=404)
        rows = []
        for index, given in enumerate(body["input"]):
            ids = given if isinstance(given, list) else encode(given)
            raw = hashlib.sha256(repr(ids).encode()).digest()
            rows.append({"index": index, "embedding": [raw[i] - 100.5 for i in range(self.dimensions)]})
        return web.json_response({"data": rows[::-1]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        if self.hold is not None:
            await self.hold.wait()
        self._check(request)
        body = await request.json()
        self.bodies.append(body)
        prompt = body["prompt"]
        if isinstance(prompt, list) and not self.names_tokens:
            return web.json_response({"detail": [{"msg": "prompt must be text"}]}, status=422)
        ids = prompt if isinstance(prompt, list) else [*([0] if self.adds_bos else []), *encode(prompt)]
        if self.max_model_len is not None and len(ids) + body["max_tokens"] > self.max_model_len:
            return web.json_response({"error": {"message": "longer than the context"}}, status=400)
        if not body.get("stream"):
            usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
            return web.json_response({"choices": [{"text": "", "finish_reason": "length"}], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._write(response, ids, body)
        except (asyncio.CancelledError, ConnectionError):
            self.left_early += 1
            raise
        finally:
            self.running -= 1
        return response

    def _check(self, request: web.Request) -> None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            raise web.HTTPUnauthorized
        if self.refuses and request.method == "POST":
            body = json.dumps({"error": {"message": self.says}})
            raise type("Refusal", (web.HTTPException,), {"status_code": self.refuses})(text=body)

    # ------------------------------------------------------------------------------------------------------ the model

    async def _write(self, response: web.StreamResponse, prompt: list[int], body: dict[str, Any]) -> None:
        ids, out = list(prompt), 0
        forced = self._forced(body)
        while True:
            if self.pace is not None:
                await self.pace(out)
            if out == self.breaks_after:
                assert response._req is not None and response._req.transport is not None
                response._req.transport.close()
                raise asyncio.CancelledError
            logits = self._logits(ids, out, body)
            token = forced[out] if forced is not None and out < len(forced) else self._choose(logits, len(ids), body)
            if forced is not None and out >= len(forced):
                token = EOS
            ids.append(token)
            out += 1
            last = "stop" if token == EOS else "length" if out == body["max_tokens"] else ""
            last = self.ends_with if last and self.ends_with else last
            await self._event(response, token, logits, body, last, named=out != self.unnamed_after)
            self.written += 1
            if last:
                break
        usage = {"prompt_tokens": len(prompt), "completion_tokens": out}
        if body.get("stream_options"):
            await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")

    async def _event(
        self,
        response: web.StreamResponse,
        token: int,
        logits: list[float],
        body: dict[str, Any],
        last: str,
        named: bool,
    ) -> None:
        hidden = token == EOS and not self.shows_stop
        choice: dict[str, Any] = {
            "index": 0,
            "text": "" if token == EOS else WORDS[token],
            "finish_reason": last or None,
        }
        if self.names_tokens and named:
            choice["token_ids"] = [] if hidden else [token]
        count = body.get("logprobs")
        if count is not None and not hidden and (named or not self.names_tokens):
            scale = body.get("temperature") or 1.0 if self.scales_logprobs else 1.0
            total = math.log(sum(math.exp(value / scale) for value in logits))
            values = {f"token_id:{i}": value / scale - total for i, value in enumerate(logits)}
            if not self.names_tokens:
                values = {WORDS[i]: value for i, value in enumerate(values.values())}
            name = f"token_id:{token}" if self.names_tokens else WORDS[token]
            top = dict(sorted(values.items(), key=lambda item: -item[1])[:count])
            choice["logprobs"] = {
                "tokens": [name],
                "token_logprobs": [values[name]],
                "top_logprobs": [{**top, name: values[name]}],
            }
        event = {"choices": [choice], "padding": "x" * self.padding}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _forced(self, body: dict[str, Any]) -> list[int] | None:
        """The one answer of the probe's schema, or an open brace for JSON mode."""
        wanted = (body.get("response_format") or {}).get("type")
        if not self.obeys_schema or wanted is None:
            return None
        return encode('{"ok":true}')

    def _logits(self, ids: list[int], out: int, body: dict[str, Any]) -> list[float]:
        seen = hashlib.sha256(repr(ids[-8:]).encode()).digest()
        logits = [seen[i % 32] / 32.0 + (i % 5) * 0.3 for i in range(len(WORDS))]
        for i, word in enumerate(WORDS):
            if i < 3 or word == "?":
                logits[i] = -20.0
        for name, bias in (body.get("logit_bias") or {}).items():
            logits[int(name)] += bias
        if self.honours_min_tokens and out < body.get("min_tokens", 0):
            logits[EOS] = -1e9
        return logits

    def _choose(self, logits: list[float], position: int, body: dict[str, Any]) -> int:
        heat = body.get("temperature", 1.0)
        if heat == 0 or (self.honours_top_k and body.get("top_k") == 1):
            return max(range(len(logits)), key=lambda i: logits[i])
        seed = body.get("seed", 0) if self.honours_seed else 0
        noise = hashlib.shake_256(f"{seed}/{position}".encode()).digest(4 * len(logits))
        drawn = [(int.from_bytes(noise[4 * i : 4 * i + 4], "big") + 0.5) / 2**32 for i in range(len(logits))]
        return max(range(len(logits)), key=lambda i: logits[i] / heat - math.log(-math.log(drawn[i])))
