"""The endpoints: OpenAI's models, completions and embeddings, and the node's own health and status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from node.gateway import errors, requests
from node.gateway.auth import ApiKeys
from node.gateway.embeddings import EmbedCall, Embeddings, parse_embeddings
from node.gateway.errors import INTERNAL, ApiError, GatewayError
from node.gateway.fields import decode_body
from node.gateway.gate import Gate
from node.gateway.guards import Doors, cors_headers, read_json_body
from node.gateway.idempotency import Exchanges, request_key
from node.gateway.jobs import Head, Jobs, Part, Purse
from node.gateway.limits import Limits
from node.gateway.models import Models
from node.gateway.replies import KEEPALIVE, event, model_entries
from node.gateway.requests import Call
from node.gateway.waiting import end, ticking, within
from node.ports import Clock, Entropy, Marketplace
from protocol.errors import TallyError
from protocol.units import Wei

_LOG: Final = logging.getLogger(__name__)

C = TypeVar("C", Call, EmbedCall)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

OWNER: Final = web.RequestKey("owner", str)
"""The hash of the API key that a request came with."""

OPEN_PATHS: Final = frozenset({"/health", "/ready"})
"""Answered without a key: they say nothing but yes or no, and supervisors have no key."""


class OpenAIApi:
    """The aiohttp application over one marketplace. `arrived`: told of each request's transport.

    `max_price`: most wei that one request may cost, whatever it asks for itself.
    """

    def __init__(
        self,
        marketplace: Marketplace,
        *,
        keys: ApiKeys,
        doors: Doors,
        clock: Clock,
        entropy: Entropy,
        limits: Limits,
        max_price: Wei | None = None,
    ) -> None:
        self._marketplace = marketplace
        self._keys = keys
        self._doors = doors
        self._clock = clock
        self._limits = limits
        self._gate = Gate(limits.jobs)
        models, purse = Models(marketplace, clock, entropy, limits), Purse(max_price, entropy.token(32))
        self._jobs = Jobs(marketplace, models, self._gate, purse, clock, entropy, limits)
        self._embeddings = Embeddings(marketplace, models, self._gate, purse)
        self._exchanges = Exchanges(clock, limits)
        self._answering: set[asyncio.Task[Any]] = set()
        self._draining = False
        self.arrived: Callable[[asyncio.BaseTransport | None], None] = lambda _transport: None

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.on_response_prepare.append(self._decorate)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/embeddings", self._embed)
        app.router.add_get("/api/v1/status", self._status)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        return app

    async def drain(self) -> None:
        """Take no more jobs; give the running ones `stop_s` to finish, then cancel them and wait until they have."""
        self._draining = True
        running = set(self._answering)
        if running:
            try:
                await within(self._clock, self._limits.stop_s, _all(running))
            except TimeoutError:
                _LOG.warning("%d answers were cut short because the gateway stops", len(running))
        await end(*running)
        await self._exchanges.close()

    # ------------------------------------------------------------------------------------------------- guards

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Host, Origin and key before anything else; whatever goes wrong becomes OpenAI's error form."""
        self.arrived(request.transport)
        try:
            self._doors.check(request)
            if request.method == "OPTIONS" and "Origin" in request.headers:
                return web.Response(status=204)
            if request.path not in OPEN_PATHS:
                self._authenticate(request)
            return await handler(request)
        except ApiError as exc:
            return _error(request, exc)
        except web.HTTPException as exc:
            code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status, "bad_request")
            said = f"{request.method} {request.path[:200]}: {exc.reason}."
            return _error(request, ApiError(exc.status, "invalid_request_error", code, said))
        except GatewayError as exc:
            _LOG.error("%s", exc)
            return _error(request, ApiError(503, "server_error", "node_unavailable", str(exc)))
        except ConnectionError:
            raise
        except Exception:  # noqa: BLE001  a bug of ours must still be an error the client understands
            _LOG.exception("%s %s failed in the gateway", request.method, request.path)
            return _error(request, INTERNAL)

    def _authenticate(self, request: web.Request) -> None:
        key = self._keys.check(request.headers.get("Authorization"))
        if key is None:
            said = "An API key of this gateway is needed: send it as 'Authorization: Bearer sk-tally-...'."
            raise ApiError(401, "authentication_error", "invalid_api_key", said)
        request[OWNER] = key.sha256

    async def _decorate(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers["X-Content-Type-Options"] = "nosniff"
        origin = request.headers.get("Origin")
        if origin is not None and self._doors.allowed(origin, request.headers.get("Host", "")):
            response.headers.update(cors_headers(origin))

    # -------------------------------------------------------------------------------------------- completions

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, requests.parse_chat, self._generate)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, requests.parse_completion, self._generate)

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        return await self._complete(request, parse_embeddings, self._vectors)

    async def _complete(
        self,
        request: web.Request,
        parse: Callable[[dict[str, Any]], C],
        produce: Callable[[C, str], AsyncGenerator[Part, None]],
    ) -> web.StreamResponse:
        body = await read_json_body(request, self._clock, self._limits)
        call = parse(decode_body(body))
        if self._draining:
            raise ApiError(
                503, "server_error", "gateway_stopping", "This gateway is stopping. Nothing was sent or paid."
            )
        header = request.headers.get("Idempotency-Key")
        if header is None:
            parts = produce(call, request[OWNER])
        else:
            key = request_key(request[OWNER], header, request.path, body)
            parts = self._exchanges.follow(key, lambda: produce(call, request[OWNER]))
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            return await self._send(request, parts, stream=call.stream)
        finally:
            self._answering.discard(task)

    async def _generate(self, call: Call, owner: str) -> AsyncGenerator[Part, None]:
        prepared = await self._jobs.prepare(call, owner)
        async with aclosing(self._jobs.answer(prepared)) as parts:
            async for part in parts:
                yield part

    async def _vectors(self, call: EmbedCall, _owner: str) -> AsyncGenerator[Part, None]:
        prepared = await self._embeddings.prepare(call)
        async with aclosing(self._embeddings.answer(prepared)) as parts:
            async for part in parts:
                yield part

    async def _send(
        self, request: web.Request, parts: AsyncGenerator[Part, None], *, stream: bool
    ) -> web.StreamResponse:
        """Write the parts as they come, and keep a silent stream alive. Leaving early closes `parts`."""
        response: web.StreamResponse | None = None
        try:
            async with aclosing(ticking(parts, self._clock, self._limits.keepalive_s)) as steps:
                async for step in steps:
                    if isinstance(step, bytes):
                        assert response is not None
                        await self._write(request, response, step)
                    elif step is None and not stream:
                        continue
                    elif response is None:
                        response = await self._begin(request, step, stream=stream)
                    if step is None and response is not None:
                        await self._write(request, response, KEEPALIVE)
        except (ApiError, TallyError) as exc:
            return await self._fail(request, response, exc if isinstance(exc, ApiError) else errors.from_tally(exc))
        except ConnectionError:
            raise
        except Exception:  # noqa: BLE001  a bug of ours must still be an error the client understands
            _LOG.exception("%s failed in the gateway", request.path)
            return await self._fail(request, response, INTERNAL)
        assert response is not None
        await response.write_eof()
        return response

    async def _begin(self, request: web.Request, head: Head | None, *, stream: bool) -> web.StreamResponse:
        response = web.StreamResponse(status=200, headers=head.headers if head is not None else {})
        response.content_type = "text/event-stream" if stream else "application/json"
        response.charset = "utf-8"
        if stream:
            response.headers["X-Accel-Buffering"] = "no"  # nginx would hold the tokens back otherwise
        await response.prepare(request)
        return response

    async def _write(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        """Raises: ConnectionResetError when the reader left or stopped reading."""
        if not data:
            return
        try:
            await within(self._clock, self._limits.write_s, response.write(data))
        except TimeoutError as exc:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the reader stopped reading") from exc

    async def _fail(
        self, request: web.Request, response: web.StreamResponse | None, failure: ApiError
    ) -> web.StreamResponse:
        """An HTTP error while that is still possible, else an error inside the stream and no end mark."""
        if response is None:
            return _error(request, failure)
        await self._write(request, response, event(failure.body()))
        response.force_close()
        await response.write_eof()
        return response

    # -------------------------------------------------------------------------------------------------- other

    async def _models(self, _request: web.Request) -> web.StreamResponse:
        return _json({"object": "list", "data": model_entries(await self._market())})

    async def _model(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        for entry in model_entries(await self._market()):
            if entry["id"] == name:
                return _json(entry)
        raise errors.model_not_found(name, "no live offer names it.")

    async def _market(self) -> list[Any]:
        try:
            return list(await self._marketplace.market())
        except TallyError as exc:
            raise errors.from_tally(exc) from exc

    async def _status(self, _request: web.Request) -> web.StreamResponse:
        try:
            status = await self._marketplace.status()
        except TallyError as exc:
            raise errors.from_tally(exc) from exc
        return _json({**status, "gateway": {"jobs": self._gate.running, "jobs_limit": self._limits.jobs}})

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        return _json({"status": "ok"})

    async def _ready(self, _request: web.Request) -> web.StreamResponse:
        """Ready once a job could be sent: at least one live offer is known."""
        if self._draining or not await self._market():
            return _json({"status": "not ready"}, status=503)
        return _json({"status": "ok"})


async def _all(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks)


def _json(value: object, *, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def _error(request: web.Request, failure: ApiError) -> web.Response:
    response = web.Response(
        body=failure.encoded(), status=failure.status, headers=failure.headers(), content_type="application/json"
    )
    # An unread body would be taken for the next request's head, or be waited for.
    if request.can_read_body and not request.content.at_eof():
        response.force_close()
    return response
