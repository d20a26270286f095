"""From a checked call to a job on the marketplace, and from the job's events to the parts of an answer.

However the reader goes away, the marketplace's iterator is closed, so that nothing more is generated or paid; and an
answer is complete only when the job's own end said so.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import msgspec
from msgspec import structs

from node.closing import closed_after
from node.gateway import errors
from node.gateway.detokenise import Token
from node.gateway.gate import Gate
from node.gateway.limits import Limits
from node.gateway.models import Models
from node.gateway.price import Price, price_json, price_up
from node.gateway.reading import Part as Piece
from node.gateway.reading import Reader, Reading
from node.gateway.replies import Progress, Reply
from node.gateway.requests import Call, Kind
from node.gateway.terms import Terms
from node.gateway.text import TextCodec
from node.gateway.tools import NO_TOOLS, call_schema
from node.ports import (
    Clock,
    Entropy,
    JobEvent,
    JobSpec,
    JobTokens,
    Marketplace,
    ModelCard,
    NoProvider,
)
from protocol.errors import TallyError
from protocol.metering import Reasoning, opens_reasoning
from protocol.options import JobOptions, Syntax
from protocol.units import Wei

DEADLINE_S: Final = 600.0
"""How long an answer may take that somebody waits for. Unit: s. OpenAI's SDKs give up after as long."""

BATCH_DEADLINE_S: Final = 4 * 3600.0
"""How long a batch job may take. Unit: s. It runs where nothing else wants to; doubling it doubles how long the escrow
for it stays reserved."""


@dataclass(frozen=True, slots=True)
class Head:
    """The answer begins: 200 with these headers."""

    headers: dict[str, str]


Part = Head | bytes
"""One step of an answer: its head once, then its body. A failure is an ApiError instead, at any point."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call with its model's card at hand and its prompt in tokens: ready to be sent. `price`: its worst cases."""

    call: Call
    card: ModelCard
    codec: TextCodec
    spec: JobSpec
    reading: Reading
    price: Price


@dataclass(frozen=True, slots=True)
class Purse:
    """What a gateway allows each request, and how it keeps their caches apart. `most`: wei, None for no limit here.

    `secret`: drawn when the gateway starts, so the prompt caches of its requests are lost to it when it stops.
    """

    most: Wei | None
    secret: bytes

    def ceiling(self, terms: Terms) -> Wei | None:
        """The most that a request may cost: its own limit, never above the gateway's."""
        limits = [limit for limit in (terms.max_price, self.most) if limit is not None]
        return min(limits, default=None)

    def cache_salt(self, terms: Terms, owner: str) -> bytes:
        """Whose prompt cache a request shares: one per API key and `prompt_cache_key`, so that no key of this gateway
        can tell from its hits what another asked."""
        key = owner.encode() + b"\0" + terms.cache_key.encode("utf-8", "replace")
        return hashlib.sha256(b"tally/prompt-cache-key/1" + self.secret + key).digest()


class Jobs:
    """Prepares and runs calls on one marketplace, a bounded number at a time."""

    def __init__(
        self,
        marketplace: Marketplace,
        models: Models,
        gate: Gate,
        purse: Purse,
        clock: Clock,
        entropy: Entropy,
        limits: Limits,
    ) -> None:
        self._marketplace = marketplace
        self._models = models
        self._gate = gate
        self._purse = purse
        self._clock = clock
        self._entropy = entropy
        self._limits = limits

    # ------------------------------------------------------------------------------------------------ prepare

    async def prepare(self, call: Call, owner: str) -> Prepared:
        """Find the model and turn the prompt into tokens. Raises: ApiError; nothing was sent or paid."""
        card, codec = await self._models.find(call.model)
        _check_tools(codec, call)
        prompt, options, reading = await self._models.work(call.model, _asked, codec, card, call)
        room = card.max_context - len(prompt)
        if room < 1:
            raise errors.context_exceeded(len(prompt), card.max_context, call.prompt_param)
        entries = await self._models.offers(call.model)
        # More than fits is read as "as much as fits": many clients send their own fixed number.
        max_tokens = min(call.max_tokens or self._default_max_tokens([e.max_output for e in entries], call), room)
        if options.min_tokens > max_tokens:
            said = f"min_tokens is {options.min_tokens}, and the prompt leaves room for {max_tokens}."
            raise errors.invalid("min_tokens", f"{said} Nothing was sent or paid.", "context_length_exceeded")
        terms = call.terms
        spec = JobSpec(
            model=call.model,
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=call.sampling,
            options=options,
            kind=terms.kind,
            tier=int(terms.tier),
            private=terms.private,
            price_ceiling=self._purse.ceiling(terms),
            deadline_s=BATCH_DEADLINE_S if terms.batch else DEADLINE_S,
            reservation=terms.reservation,
            cache_salt=self._purse.cache_salt(terms, owner),
            only=terms.only,
            messages=_plain(call),
        )
        return Prepared(call, card, codec, spec, reading, price_up(entries, spec, card.profile_id))

    def _default_max_tokens(self, allowed: list[int], call: Call) -> int:
        """1,024 tokens, or the most that any offer of the model allows; never less than `min_tokens`."""
        most = min([self._limits.default_max_tokens, *([max(allowed)] if allowed else [])])
        return max(1, most, call.options.min_tokens)

    # ---------------------------------------------------------------------------------------------------- run

    async def answer(self, prepared: Prepared) -> AsyncGenerator[Part, None]:
        """Run the job and give the answer's parts as they come. Raises: ApiError."""
        if prepared.call.terms.dry_run:
            yield Head({})
            yield msgspec.json.encode(price_json(prepared.spec, prepared.price))
            return
        with self._gate.entered():
            token = self._entropy.token(12).hex()
            reply = Reply(
                prepared.call, prepared.card, prepared.reading.form, token=token, created=self._clock.now_ms() // 1000
            )
            progress = Progress(len(prepared.spec.prompt))
            make = _streamed if prepared.call.stream else _whole
            async with aclosing(make(reply, self._pieces(prepared, progress), progress)) as parts:
                async for part in parts:
                    yield part

    async def _pieces(self, prepared: Prepared, progress: Progress) -> AsyncGenerator[Piece, None]:
        """What is said as it comes; when this ends, `progress.finish_reason` is set. Raises: ApiError."""
        reader = prepared.codec.reader(prepared.reading)
        try:
            async with closed_after(self._marketplace.run(prepared.spec)) as job:
                async for event in job:
                    piece = _advance(progress, reader, event)
                    if not piece.empty:
                        progress.text.append(piece.text)
                        yield piece
                    if reader.stopped and not _ends_itself(event, prepared.spec):
                        break
        except TallyError as exc:
            raise failure(exc, prepared.price).for_delivered(progress.delivered()) from exc
        finish = "stop" if reader.stopped else progress.end()
        last = reader.finish()
        if not last.empty:
            progress.text.append(last.text)
            yield last
        progress.finish_reason = "tool_calls" if reader.called and finish == "stop" else finish


def _plain(call: Call) -> tuple[tuple[str, str], ...]:
    """A chat as (role, content) pairs; () where it is none, or has tools, which such pairs cannot say."""
    spoken = any(message.calls or message.role == "tool" for message in call.messages)
    if spoken or call.toolbox is not NO_TOOLS:
        return ()
    return tuple((message.role, message.content) for message in call.messages)


def _check_tools(codec: TextCodec, call: Call) -> None:
    """Raises: ApiError (400) when the model's template has no place for what the call says of tools."""
    spoken = any(message.calls or message.role == "tool" for message in call.messages)
    param = "tools" if call.toolbox is not NO_TOOLS else "messages"
    if (call.toolbox.callable or spoken) and not codec.takes_tools:
        raise errors.unsupported(param, f"{call.model}'s chat template does not take tools. Choose another model.")
    if call.toolbox.callable and codec.tool_form is None:
        said = f"{call.model} writes function calls in a form that this gateway does not read. Choose another model,"
        raise errors.unsupported("tools", f"{said} or use /v1/completions and read them yourself.")


def _asked(codec: TextCodec, card: ModelCard, call: Call) -> tuple[tuple[int, ...], JobOptions, Reading]:
    """The prompt, the options and how the output is to be read. Raises: TallyError, ApiError."""
    prompt, options, profile = _encode(codec, call), call.options, card.profile
    form = codec.tool_form if call.toolbox.callable else None
    forced = form is not None and bool(call.toolbox.forced)
    if form is not None and forced:
        grammar = call_schema(call.toolbox.forced, form.arguments_key)
        options = structs.replace(options, syntax=Syntax.JSON_SCHEMA, grammar=grammar)
    if options.syntax is not Syntax.NONE and opens_reasoning(profile, prompt):
        # A grammar holds from the first token, so a reasoning block that the template opened would hold the answer.
        prompt += (profile.reasoning_end,)
    if form is not None and forced:
        prompt += codec.encode_own(form.prefill)
    reasoning = Reasoning(0, 0)
    if call.kind is Kind.CHAT:
        reasoning = Reasoning(profile.reasoning_start, profile.reasoning_end, opens_reasoning(profile, prompt))
    hidden = frozenset(options.stop_ids)
    if reasoning.start == reasoning.end and not options.min_tokens:
        # Where the whole output is text, the provider itself can stop at a token, and sign a final receipt for it.
        options = structs.replace(options, stop_ids=tuple(sorted(hidden.union(codec.stop_ids(call.stops)))))
    reading = Reading(
        reasoning,
        call.stops,
        options.min_tokens,
        hidden,
        form,
        call.toolbox.names,
        prefilled=forced and bool(form and form.prefill),
        parallel=call.toolbox.parallel or forced,
    )
    return prompt, options, reading


def _encode(codec: TextCodec, call: Call) -> tuple[int, ...]:
    if isinstance(call.prompt, str):
        return codec.encode_text(call.prompt)
    if call.messages:
        tools = [tool.document for tool in call.toolbox.tools] if call.toolbox.callable else []
        return codec.encode_chat(call.messages, tools)
    ids = tuple(item for item in call.prompt if isinstance(item, int))
    check_ids(codec, ids, "prompt")
    return ids


def check_ids(codec: TextCodec, ids: tuple[int, ...], param: str) -> None:
    """Raises: ApiError (400) when one is no token of the model's."""
    if max(ids) >= codec.vocab_size:
        raise errors.invalid(param, f"{param} has token ids above {codec.vocab_size - 1}, the model's last.")


def failure(exc: TallyError, price: Price) -> errors.ApiError:
    """The answer to a job that failed; where nobody took it, what the offers say of that."""
    if isinstance(exc, NoProvider) and price.objection is not None:
        return price.objection
    return errors.from_tally(exc)


def _advance(progress: Progress, reader: Reader, event: JobEvent) -> Piece:
    """Take one event of the job into account; what it made certain, if it brought tokens."""
    progress.take(event)
    if not isinstance(event, JobTokens):
        return Piece()
    likeliest = event.alternatives or ((),) * len(event.token_ids)
    logprobs = event.logprobs or (0.0,) * len(event.token_ids)
    piece = reader.push(
        [Token(*token) for token in zip(event.token_ids, logprobs, likeliest, strict=True)],
    )
    progress.reasoning_tokens = reader.reasoning_tokens
    return piece


def _ends_itself(event: JobEvent, spec: JobSpec) -> bool:
    """Whether the provider stops here by itself, so that waiting brings the final receipt rather than more tokens."""
    return not isinstance(event, JobTokens) or (bool(event.token_ids) and event.token_ids[-1] in spec.options.stop_ids)


async def _whole(reply: Reply, pieces: AsyncGenerator[Piece, None], progress: Progress) -> AsyncGenerator[Part, None]:
    parts: list[Piece] = []
    async with aclosing(pieces):
        async for piece in pieces:
            parts.append(piece)
    yield Head({**progress.headers(), **progress.cost_headers(), "x-request-id": reply.id})
    yield reply.whole(parts, progress)


async def _streamed(
    reply: Reply, pieces: AsyncGenerator[Piece, None], progress: Progress
) -> AsyncGenerator[Part, None]:
    """The head waits for the first text, so that a job that fails before it is a plain HTTP error."""
    begun = False
    async with aclosing(pieces):
        async for piece in pieces:
            if not begun:
                begun = True
                yield Head({**progress.headers(), "x-request-id": reply.id})
                yield reply.opening()
            yield reply.piece(piece)
    if not begun:
        yield Head({**progress.headers(), "x-request-id": reply.id})
        yield reply.opening()
    yield reply.closing(progress)
