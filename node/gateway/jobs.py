"""From a checked call to a job on the marketplace, and from the job's events to the parts of an answer.

However the reader goes away, the marketplace's iterator is closed, so that nothing more is generated or paid; and an
answer is complete only when the job's own end said so.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from node.gateway import errors
from node.gateway.detokenise import Piece, TextStream, TokenText
from node.gateway.limits import Limits
from node.gateway.replies import Progress, Reply
from node.gateway.requests import Call
from node.gateway.text import TextCodec
from node.gateway.waiting import within
from node.ports import (
    Clock,
    Entropy,
    JobDone,
    JobEvent,
    JobPaid,
    JobSpec,
    JobStarted,
    JobTokens,
    Marketplace,
    ModelCard,
    NoProvider,
)
from protocol.errors import TallyError
from protocol.options import JobOptions
from protocol.units import FinishReason

KEPT_CODECS: Final = 4
"""Models whose tokenizers stay loaded. One of a large vocabulary takes about 100 MB and a second to load."""

_FINISH: Final = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
"""The ends that OpenAI's finish_reason knows. Every other end is an error."""


@dataclass(frozen=True, slots=True)
class Head:
    """The answer begins: 200 with these headers."""

    headers: dict[str, str]


Part = Head | bytes
"""One step of an answer: its head once, then its body. A failure is an ApiError instead, at any point."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call with its model's card at hand and its prompt in tokens: ready to be sent."""

    call: Call
    card: ModelCard
    codec: TextCodec
    spec: JobSpec


class Jobs:
    """Prepares and runs calls on one marketplace, a bounded number at a time."""

    def __init__(self, marketplace: Marketplace, clock: Clock, entropy: Entropy, limits: Limits) -> None:
        self._marketplace = marketplace
        self._clock = clock
        self._entropy = entropy
        self._limits = limits
        self._codecs: OrderedDict[bytes, asyncio.Future[TextCodec]] = OrderedDict()
        self.running = 0

    # ------------------------------------------------------------------------------------------------ prepare

    async def prepare(self, call: Call) -> Prepared:
        """Find the model and turn the prompt into tokens. Raises: ApiError; nothing was sent or paid."""
        try:
            card = await self._marketplace.card(call.model)
        except NoProvider as exc:
            raise errors.model_not_found(call.model, str(exc)) from exc
        except TallyError as exc:
            raise errors.from_tally(exc) from exc
        try:
            codec = await within(self._clock, self._limits.codec_s, self._codec(card))
            prompt = await within(self._clock, self._limits.codec_s, asyncio.to_thread(_encode, codec, call))
            stop_ids = codec.stop_ids(call.stops)
        except TallyError as exc:
            raise errors.from_tally(exc) from exc
        except TimeoutError as exc:
            said = (
                f"{call.model}'s tokenizer or template took longer than {self._limits.codec_s:g} s. Nothing was sent."
            )
            raise errors.invalid("model", said, "model_unusable") from exc
        room = card.max_context - len(prompt)
        if room < 1:
            raise errors.context_exceeded(len(prompt), card.max_context, call.prompt_param)
        wanted = call.max_tokens if call.max_tokens is not None else await self._default_max_tokens(call.model)
        spec = JobSpec(
            model=call.model,
            prompt=prompt,
            # More than fits is read as "as much as fits": many clients send their own fixed number.
            max_tokens=min(wanted, room),
            sampling=call.sampling,
            options=JobOptions(stop_ids=stop_ids),
            tier=int(call.tier),
        )
        return Prepared(call, card, codec, spec)

    async def _default_max_tokens(self, model: str) -> int:
        """1,024 tokens, or the most that any offer of the model allows."""
        allowed = [entry.max_output for entry in await self._marketplace.market() if entry.model == model]
        return max(1, min([self._limits.default_max_tokens, *([max(allowed)] if allowed else [])]))

    async def _codec(self, card: ModelCard) -> TextCodec:
        found = self._codecs.get(card.profile_id)
        if found is None:
            found = asyncio.ensure_future(asyncio.to_thread(self._load, card))
            self._codecs[card.profile_id] = found
            while len(self._codecs) > KEPT_CODECS:
                self._codecs.popitem(last=False)
        self._codecs.move_to_end(card.profile_id)
        try:
            # Shielded: one reader leaving must not fail the others who wait for the same tokenizer.
            return await asyncio.shield(found)
        except TallyError:
            self._codecs.pop(card.profile_id, None)
            raise

    def _load(self, card: ModelCard) -> TextCodec:
        def now() -> datetime:
            return datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC)

        return TextCodec(card, entropy=self._entropy.token, now=now)

    # ---------------------------------------------------------------------------------------------------- run

    async def answer(self, prepared: Prepared) -> AsyncGenerator[Part, None]:
        """Run the job and give the answer's parts as they come. Raises: ApiError."""
        if self.running >= self._limits.jobs:
            raise errors.too_busy(f"This gateway already runs {self.running} jobs. Nothing was sent or paid.")
        self.running += 1
        try:
            token = self._entropy.token(12).hex()
            reply = Reply(prepared.call, prepared.card, token=token, created=self._clock.now_ms() // 1000)
            progress = Progress(len(prepared.spec.prompt))
            make = _streamed if prepared.call.stream else _whole
            async with aclosing(make(reply, self._pieces(prepared, progress), progress)) as parts:
                async for part in parts:
                    yield part
        finally:
            self.running -= 1

    async def _pieces(self, prepared: Prepared, progress: Progress) -> AsyncGenerator[Piece, None]:
        """The text as it comes; when this ends, `progress.finish_reason` is set. Raises: ApiError."""
        stream = prepared.codec.stream(prepared.call.stops)
        try:
            async with _closed_after(self._marketplace.run(prepared.spec)) as job:
                async for event in job:
                    piece = _advance(progress, stream, event)
                    if piece is not None and (piece.text or piece.tokens):
                        progress.text.append(piece.text)
                        yield piece
                    if stream.stopped is not None and not _ends_itself(event, prepared.spec):
                        progress.finish_reason = "stop"
                        return
        except TallyError as exc:
            raise errors.from_tally(exc).for_delivered(progress.delivered()) from exc
        if stream.stopped is not None:
            progress.finish_reason = "stop"
            return
        if progress.done is None:
            raise errors.from_finish(FinishReason.ERROR).for_delivered(progress.delivered())
        if progress.done.finish not in _FINISH:
            raise errors.from_finish(progress.done.finish).for_delivered(progress.delivered())
        progress.finish_reason = _FINISH[progress.done.finish]
        last = stream.finish()
        if last.text or last.tokens:
            progress.text.append(last.text)
            yield last


def _encode(codec: TextCodec, call: Call) -> tuple[int, ...]:
    if isinstance(call.prompt, str):
        return codec.encode_text(call.prompt)
    messages = [item for item in call.prompt if not isinstance(item, int)]
    if messages:
        return codec.encode_chat(messages)
    ids = tuple(item for item in call.prompt if isinstance(item, int))
    if max(ids) >= codec.vocab_size:
        raise errors.invalid("prompt", f"prompt has token ids above {codec.vocab_size - 1}, the model's last.")
    return ids


def _closed_after(job: AsyncIterator[JobEvent]) -> aclosing[AsyncGenerator[JobEvent, None]]:
    """Closes the job's iterator on leaving, whatever kind of iterator the marketplace gave."""

    async def events() -> AsyncGenerator[JobEvent, None]:
        try:
            async for event in job:
                yield event
        finally:
            close = getattr(job, "aclose", None)
            if close is not None:
                await close()

    return aclosing(events())


def _advance(progress: Progress, stream: TextStream, event: JobEvent) -> Piece | None:
    """Take one event of the job into account; the text it made certain, if it brought tokens."""
    if isinstance(event, JobStarted):
        progress.jobs.append("0x" + event.job_id.hex())
        progress.provider = "0x" + event.provider.hex()
    elif isinstance(event, JobPaid):
        progress.cost = event.total
    elif isinstance(event, JobDone):
        progress.done = event
        progress.cost = event.cost
    elif isinstance(event, JobTokens):
        progress.tokens += len(event.token_ids)
        return stream.push(event.token_ids, event.logprobs)
    return None


def _ends_itself(event: JobEvent, spec: JobSpec) -> bool:
    """Whether the provider stops here by itself, so that waiting brings the final receipt rather than more tokens."""
    return not isinstance(event, JobTokens) or (bool(event.token_ids) and event.token_ids[-1] in spec.options.stop_ids)


async def _whole(reply: Reply, pieces: AsyncGenerator[Piece, None], progress: Progress) -> AsyncGenerator[Part, None]:
    tokens: list[TokenText] = []
    async with aclosing(pieces):
        async for piece in pieces:
            tokens += piece.tokens
    cost = str(progress.done.cost if progress.done else progress.cost)
    yield Head({**progress.headers(), "x-tally-cost": cost, "x-request-id": reply.id})
    yield reply.whole("".join(progress.text), tokens, progress)


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
