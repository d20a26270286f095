"""The engine port over any OpenAI-compatible server: for models that need more machines than a node computes on.

What is sold is what the server gives and `probe` saw it do. Nothing of it can be replayed: the server samples by its
own rule, so a seed only makes the same server repeat itself. The offer says LOGPROB where the server names every token
with its plain logprob, which any holder of the model can check, and NONE everywhere else; projections are zero bytes.
Prefix-cache hits are the server's own affair: they are announced after the last token, and a receipt states them from
the first, so none is claimed.

A refusal comes before acceptance where the server gives it within HEADERS_S; later it breaks the stream, and the client
goes to another provider with nothing charged beyond what it had vouched for.
"""

from __future__ import annotations

import asyncio
import logging
import math
import struct
import weakref
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from node.ports import Clock, EngineFull, EngineRequest, EngineStats, Urgency
from node.upstream.http import Busy, HttpServer, Rejected, UpstreamError, read_key
from node.upstream.probe import Abilities, json_schema, probe
from node.upstream.settings import UpstreamSettings
from node.upstream.stream import Load, UpstreamStream
from node.upstream.texts import Texts
from node.upstream.turns import Turns
from node.upstream.writing import Writing
from protocol.errors import LocalProtocolError
from protocol.messages import Profile
from protocol.options import PENALTY_ONE, Syntax
from protocol.sampling import MICRO
from protocol.units import Verifiability

log = logging.getLogger("tally.upstream")

TURN_S: Final = 4.0
HEADERS_S: Final = 4.0
"""How long `submit` waits for a turn, and then for the server to accept. Unit: s. Together below the ten a client waits
for an acceptance; a server that takes longer is trusted first and may refuse later, which breaks the stream."""


@dataclass(frozen=True, slots=True)
class ModelTexts:
    """What the directory of the served model says. `bos_id`: None when it has none. `max_context`: tokens."""

    tokenizer_json: bytes
    eos_ids: tuple[int, ...]
    bos_id: int | None
    max_context: int


class UpstreamEngine:
    """See node.ports.Engine. `profile_of`: the profile for what the server was seen to do.

    Raises: ValueError from the constructor when the tokenizer is none.
    """

    def __init__(
        self, settings: UpstreamSettings, model: ModelTexts, profile_of: Callable[[Abilities], Profile], clock: Clock
    ) -> None:
        self._settings, self._model, self._profile_of, self._clock = settings, model, profile_of, clock
        self._texts = Texts(model.tokenizer_json)
        self._turns = Turns(settings.slots, settings.max_queue)
        self._stack = AsyncExitStack()
        self._server: HttpServer | None = None
        self._able = Abilities("")
        self._profile: Profile | None = None
        self._streams: weakref.WeakSet[UpstreamStream] = weakref.WeakSet()
        self._load = Load(clock)

    @property
    def profile(self) -> Profile:
        """Known once started."""
        if self._profile is None:
            raise LocalProtocolError("the engine is not started: its profile is not known yet")
        return self._profile

    @property
    def abilities(self) -> Abilities:
        """What the server was seen to do, once started."""
        return self._able

    @property
    def max_context(self) -> int:
        return min(self._model.max_context, self._able.max_context or self._model.max_context)

    @property
    def vocab_size(self) -> int:
        return self._texts.size

    @property
    def hidden_size(self) -> int:
        return self._able.embedding

    @property
    def verifiability(self) -> Verifiability:
        return Verifiability.LOGPROB if self._able.checkable else Verifiability.NONE

    async def start(self) -> None:
        """Connect and find out what the server can do. Raises: UrlRefused, UpstreamError."""
        settings = self._settings
        key = read_key(settings.key_file) if settings.key_file is not None else ""
        server = HttpServer(
            settings.url, key=key, allow_private=settings.allow_private, connections=settings.slots + settings.max_queue
        )
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(server)
            able = await probe(server, settings.model, self._texts, self._model.eos_ids, self._model.bos_id)
            self._profile = self._profile_of(able)
            self._able, self._server = able, server
            self._stack = stack.pop_all()
        log.info("serving through an upstream server", extra={"upstream": server.target.base, "abilities": str(able)})

    async def stop(self) -> None:
        """Close all requests; open streams raise UpstreamError. Idempotent."""
        self._server = None
        for stream in list(self._streams):
            stream.break_off(UpstreamError("the engine was stopped while the stream was open"))
        await self._stack.aclose()

    async def submit(self, request: EngineRequest) -> UpstreamStream:
        """Raises: EngineFull; ValueError; UpstreamError (the server failed, and nothing was generated)."""
        body = self._body(request)
        server = self._running()
        began = self._clock.monotonic()
        await self._turns.take(request.urgency, TURN_S)
        self._load.begin(self._turns.active)
        opening = asyncio.create_task(server.stream("/completions", body))
        writing = Writing(request, self._able, self._texts, self._model.eos_ids)
        stream = UpstreamStream(opening, writing, self._load, self._left, began)
        self._streams.add(stream)
        try:
            await asyncio.wait({opening}, timeout=HEADERS_S)
            if opening.done():
                opening.result()
        except BaseException as exc:
            await stream.aclose()
            raise _refusal(exc) from exc
        self._load.prompt_total += len(request.prompt)
        return stream

    async def embed(self, inputs: Sequence[tuple[int, ...]], dimensions: int, urgency: Urgency) -> tuple[bytes, ...]:
        """Unit vectors as the server makes them, cut to `dimensions` and normalised again; fp32 little-endian.

        Raises: EngineFull; ValueError; UpstreamError.
        """
        size = self._able.embedding
        if not size:
            raise ValueError("the server behind this provider makes no embeddings")
        if not 0 <= dimensions <= size:
            raise ValueError(f"dimensions {dimensions}: this model's vectors have {size}")
        for ids in inputs:
            self._check_ids(ids, 0)
        given = [list(ids) if self._able.embed_ids else self._texts.said(ids) for ids in inputs]
        server = self._running()
        await self._turns.take(urgency, TURN_S)
        self._load.begin(self._turns.active)
        try:
            found = await server.post("/embeddings", {"model": self._able.model, "input": given})
            vectors = _vectors(found, len(inputs), size)
        except UpstreamError as exc:
            raise _refusal(exc) from exc
        finally:
            self._left()
        self._load.prompt_total += sum(map(len, inputs))
        return tuple(_unit(vector[: dimensions or size]) for vector in vectors)

    def wait_ms(self, urgency: Urgency, prompt_tokens: int) -> int:
        """From what was seen: the time to a first token, and until a slot frees when none is free.

        The server does not tell what length costs it, nor does it know of urgency beyond our own queue.
        """
        del urgency, prompt_tokens
        ahead = self._turns.queued + 1 if self._turns.active >= self._settings.slots else 0
        return int(1000 * (self._load.first_s + ahead * self._load.whole_s / self._settings.slots))

    def stats(self) -> EngineStats:
        load = self._load
        return EngineStats(
            slots=self._settings.slots,
            active=self._turns.active,
            queued=self._turns.queued,
            kv_bytes=0,
            tokens_total=load.tokens_total,
            prompt_total=load.prompt_total,
            busy_s=load.busy_s(),
        )

    # --------------------------------------------------------------------------------------------------------- inside

    def _running(self) -> HttpServer:
        if self._server is None:
            raise UpstreamError("the engine is not running: start it first")
        return self._server

    def _left(self) -> None:
        self._turns.give_back()
        self._load.end(self._turns.active)

    def _check_ids(self, ids: Sequence[int], more: int) -> None:
        if not ids:
            raise ValueError("the prompt is empty: at least one token is needed")
        if len(ids) + more > self.max_context:
            raise ValueError(f"prompt of {len(ids)} tokens plus {more} is above the context of {self.max_context}")
        if min(ids) < 0 or max(ids) >= self._texts.size:
            raise ValueError(f"a token id is outside the vocabulary of {self._texts.size}")

    def _body(self, request: EngineRequest) -> dict[str, Any]:
        """The completion request. Raises: ValueError for what this server cannot do as asked."""
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}, at least 1 is needed")
        self._check_ids(request.prompt, request.max_tokens)
        able, sampling, options = self._able, request.sampling, request.options
        body: dict[str, Any] = {
            "model": able.model,
            "prompt": self._prompt(request.prompt),
            **dict(able.fields),
            "stream": True,
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature_micro / MICRO,
            "top_p": sampling.top_p_micro / MICRO,
            "seed": int.from_bytes(request.seed[:4], "big") >> 1,  # 31 bits: every server takes that many
        }
        if sampling.top_k:
            _need(able.top_k, "top_k")
            body["top_k"] = sampling.top_k
        if options.continued and (options.penalised or options.syntax is not Syntax.NONE):
            raise ValueError("the server behind this provider cannot count a continued text as output: ask another")
        if options.penalised:
            body["frequency_penalty"] = options.frequency_milli / PENALTY_ONE
            body["presence_penalty"] = options.presence_milli / PENALTY_ONE
        if options.min_tokens > options.continued:
            _need(able.min_tokens, "min_tokens")
            if options.stop_ids:
                raise ValueError("the server behind this provider cannot hold back stop ids until min_tokens")
            body["min_tokens"] = options.min_tokens - options.continued
        if options.alternatives:
            _need(able.alternatives, "the likeliest alternatives of a token")
            body["logprobs"] = options.alternatives
        match options.syntax:
            case Syntax.NONE:
                pass
            case Syntax.JSON:
                _need(able.json_mode, "JSON mode")
                body["response_format"] = {"type": "json_object"}
            case Syntax.JSON_SCHEMA:
                _need(able.json_schema, "a JSON Schema")
                body["response_format"] = json_schema(_schema(options.grammar))
            case Syntax.LARK:
                raise ValueError("the server behind this provider takes no Lark grammar")
        return body

    def _prompt(self, ids: tuple[int, ...]) -> list[int] | str:
        """Raises: ValueError when the server takes text and these ids have none."""
        if self._able.ids_in:
            return list(ids)
        if self._able.adds_bos:
            if ids[0] != self._model.bos_id or len(ids) == 1:
                raise ValueError("the server behind this provider begins every prompt with its BOS token: begin so too")
            ids = ids[1:]
        return self._texts.said(ids)


def _need(shown: bool, what: str) -> None:
    """Raises: ValueError unless the server was seen to do it."""
    if not shown:
        raise ValueError(f"the server behind this provider was not seen to honour {what}: ask another provider")


def _schema(text: str) -> Any:
    """Raises: ValueError."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise ValueError(f"the schema is no JSON: {exc}") from exc


def _refusal(exc: BaseException) -> BaseException:
    """A server's refusal in the port's terms; anything else as it is."""
    if isinstance(exc, Rejected):
        return ValueError(f"the server behind this provider refuses the request: {exc.said or f'HTTP {exc.status}'}")
    if isinstance(exc, Busy):
        return EngineFull(str(exc))
    return exc


def _vectors(found: Any, inputs: int, size: int) -> list[list[float]]:
    """Raises: UpstreamError when it is not one vector of `size` finite numbers per input."""
    try:
        rows = sorted(found["data"], key=lambda row: int(row.get("index", 0)))
        out = [[float(value) for value in row["embedding"]] for row in rows]
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise UpstreamError("the upstream server sent embeddings in another form") from exc
    if len(out) != inputs or any(len(row) != size or not all(map(math.isfinite, row)) for row in out):
        raise UpstreamError("the upstream server sent other embeddings than were asked for")
    return out


def _unit(vector: Sequence[float]) -> bytes:
    """Raises: UpstreamError for a vector without a direction."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    if not length:
        raise UpstreamError("the upstream server sent an embedding of length zero")
    return struct.pack(f"<{len(vector)}f", *(value / length for value in vector))
