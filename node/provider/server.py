"""The provider's side of /tally/job/1 and /tally/card/1: a handler per stream, whose failure costs only that stream."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Final

from incentives.ledger import JobOpened, PromptKept, Role
from incentives.prefixes import Prefixes
from node.jobstream import JobStream
from node.ports import Engine, EngineFull, Entropy, ModelCard, Stream, StreamEnded, TokenStream, Urgency
from node.provider.admission import (
    Admitted,
    Terms,
    check_prompt,
    check_request,
    check_tariff_now,
    engine_request,
    urgency_of,
)
from node.provider.delivery import Delivery, Tools
from node.provider.epochs import Epochs
from node.provider.offering import Offering
from node.provider.reservations import Reservations
from node.whole import whole
from protocol import frames
from protocol.cache import block_heads
from protocol.errors import Overspend, Refused, RemoteProtocolError, TallyError, UnexpectedFrame
from protocol.frames import (
    Abort,
    Accepted,
    CardAsk,
    CardChunk,
    CardHead,
    PromptChunk,
    Quote,
    QuoteAsk,
    RefusalCode,
    Refuse,
    Request,
)
from protocol.messages import Accept
from protocol.metering import Usage, job_ste_micro
from protocol.packing import pack
from protocol.sealing import Sealed
from protocol.session import Side, State
from protocol.units import ZERO_DIGEST, Address, Digest, FinishReason, JobId, JobKind, Wei
from protocol.work import Work, nonce_commitment

log = logging.getLogger("tally.provider")

ASK_TIMEOUT_S: Final = 10.0
"""A stream that says nothing for this long is closed. Unit: s."""

PROMPT_TIMEOUT_S: Final = 30.0
"""For the whole prompt. Unit: s. The largest context sold is a few MiB; a stream is held meanwhile."""

QUOTE_LIFE_S: Final = 30.0
"""How long a quote waits for its request. Unit: s. The nonce it commits to is held in memory as long."""

MAX_STREAMS: Final = 256
"""Job streams at once, quotes included. Each holds one increment and a conversation; more would wait for slots."""

MAX_STREAMS_PER_PEER: Final = 128
"""Job streams of one peer at once, so that none keeps the others out. A busy gateway has as many as we have slots."""


@contextlib.contextmanager
def _engine_refusals() -> Iterator[None]:
    """What the engine does not take, as the client is told it. Raises: Refused."""
    try:
        yield
    except EngineFull as exc:
        raise Refused(RefusalCode.BUSY, str(exc)) from exc
    except ValueError as exc:
        raise Refused(RefusalCode.BAD_REQUEST, str(exc)) from exc


class RunningJobs:
    """When each job that is not closed was accepted, Unix ms."""

    def __init__(self) -> None:
        self._jobs: dict[JobId, int] = {}

    def accept(self, job_id: JobId, accepted_ms: int) -> None:
        self._jobs[job_id] = accepted_ms

    def close(self, job_id: JobId) -> None:
        self._jobs.pop(job_id, None)

    def accepted(self) -> tuple[int, ...]:
        """Acceptance times."""
        return tuple(self._jobs.values())


class JobServer:
    """Serves jobs under the offering's terms. `draining` refuses new ones. `promised`: prompts this provider said it
    keeps before it was started. `keeps`: content stays for audits, unless its job is private."""

    def __init__(
        self,
        tools: Tools,
        engine: Engine,
        entropy: Entropy,
        card: ModelCard,
        offering: Offering,
        reservations: Reservations,
        promised: Prefixes,
        running: RunningJobs,
        epochs: Epochs,
        *,
        keeps: bool,
    ) -> None:
        self._tools = tools
        self._accepted = running
        self._epochs = epochs
        self._keeps = keeps
        self._promised = promised
        self._reservations = reservations
        self._engine = engine
        self._entropy = entropy
        self._card = card
        self._offering = offering
        self.draining = False
        self.jobs_served = 0
        self.tokens_served = 0
        self._streams: Counter[str] = Counter()
        self._running: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        """Jobs accepted and not yet closed."""
        return len(self._running)

    async def drain(self, limit_s: float) -> None:
        """Refuse new jobs and wait for the running ones, at most `limit_s`; then cut them off."""
        self.draining = True
        if self._running:
            _, late = await asyncio.wait(set(self._running), timeout=limit_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def handle_job(self, stream: Stream) -> None:
        """One stream of /tally/job/1."""
        peer = stream.peer_id
        if self._streams.total() >= MAX_STREAMS or self._streams[peer] >= MAX_STREAMS_PER_PEER:
            await stream.reset()
            return
        self._streams[peer] += 1
        try:
            async with JobStream(stream, Side.PROVIDER, self._tools.clock) as talk:
                await self._converse(talk)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    async def _converse(self, talk: JobStream) -> None:
        """Quote, request, delivery; and the one place that turns what went wrong into the client's last frame."""
        try:
            nonce = await self._quote(talk)
            request = await talk.expect(Request, QUOTE_LIFE_S)
            await self._serve(talk, request, nonce)
        except StreamEnded as exc:
            log.debug("job stream of %s ended: %s", talk.stream.peer_id, exc)
        except Refused as exc:
            await self._last_word(talk, exc.code, exc.reason)
        except RemoteProtocolError as exc:
            log.warning("peer %s broke the protocol: %s", talk.stream.peer_id, exc)
            await self._last_word(talk, RefusalCode.BAD_REQUEST, str(exc))
        except (TallyError, ValueError) as exc:
            log.error("a job failed here, nothing unvouched is charged: %s", exc)
            await self._last_word(talk, RefusalCode.INTERNAL, "the provider failed; nothing unvouched is charged")

    async def _last_word(self, talk: JobStream, code: str, reason: str) -> None:
        before_acceptance = talk.conversation.state in (State.ASKED, State.REQUESTED)
        goodbye = Refuse(code, reason[:1024]) if before_acceptance else Abort(code, reason[:1024])
        with contextlib.suppress(TallyError):
            await talk.send(goodbye)

    async def _quote(self, talk: JobStream) -> bytes:
        """Answer a QuoteAsk; returns the nonce the quote commits to. Raises: Refused, StreamEnded."""
        ask = await talk.expect(QuoteAsk, ASK_TIMEOUT_S)
        terms = self._offering.terms()
        if self.draining:
            raise Refused(RefusalCode.DRAINING, "this provider is shutting down")
        if ask.profile_id != terms.profile_id:
            raise Refused(RefusalCode.UNKNOWN_MODEL, "this provider does not serve that profile")
        if ask.prompt_tokens + ask.max_tokens > terms.max_context:
            raise Refused(RefusalCode.CONTEXT_LENGTH, f"prompt and output together may have {terms.max_context} tokens")
        newest = max(terms.tariffs.items(), key=lambda item: item[1].sequence, default=None)
        if newest is None:
            raise Refused(RefusalCode.TARIFF, "no tariff of this provider is in force yet")
        nonce = self._entropy.token(32)
        wait = self._engine.wait_ms(Urgency(ask.tier + 1), ask.prompt_tokens)
        await talk.send(Quote(nonce_commitment(nonce), newest[0], wait))
        return nonce

    async def _serve(self, talk: JobStream, frame: Request, nonce: bytes) -> None:
        """Admit, journal, accept, deliver. Raises: Refused, RemoteProtocolError, StreamEnded, StoreError."""
        tools = self._tools
        terms = self._offering.terms()
        admitted = check_request(tools.domain, terms, frame, nonce, tools.clock.now_ms())
        box_key = self._offering.box_key(frame.box_key)
        if box_key is None:
            raise Refused(RefusalCode.TARIFF, "the prompt is sealed to a box key that is gone; take the current offer")
        if admitted.request.client_box_key == box_key.public:
            raise RemoteProtocolError("the client uses our own box key")
        sealed = Sealed(box_key, admitted.request.client_box_key, we_are_client=False)
        plaintext = await self._read_prompt(talk, sealed, frame.prompt_chunks)
        prompt = check_prompt(terms, admitted, frame.salt, plaintext)
        client = Address(admitted.request.client)
        await tools.books.confirm(client, admitted.first_increment)
        if await tools.store.job(admitted.job_id) is not None:
            raise Refused(RefusalCode.DUPLICATE, "this job was requested before; a new one needs a new client nonce")
        if self.draining:
            raise Refused(RefusalCode.DRAINING, "this provider is shutting down")
        if not tools.books.trusts(client, admitted.first_increment):
            reason = (
                "too much was delivered on this channel and never vouched for; it serves again once that is made up"
            )
            raise Refused(RefusalCode.PAYMENT_REQUIRED, reason)
        # SPEC 4.11: before the first token it reserves the worst case of prompt and first increment
        try:
            tools.books.reserve(client, admitted.job_id, Wei(admitted.first_increment))
        except Overspend as exc:
            raise Refused(RefusalCode.PAYMENT_REQUIRED, f"escrow does not cover the first increment: {exc}") from exc
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            reserved = await self._use_reservation(admitted, terms)
            await self._accept_and_deliver(talk, frame, admitted, nonce, sealed, prompt, reserved)
        finally:
            self._running.discard(task)
            tools.books.release(client, admitted.job_id)

    async def _use_reservation(self, admitted: Admitted, terms: Terms) -> int:
        """Take the most that the job may compute from the right it names, in micro-STE; 0 when it names none.

        Raises: Refused.
        """
        # SPEC 5.10: The provider checks that the reservation is for it and this profile, active, and assigned
        request = admitted.request
        if request.reservation == ZERO_DIGEST:
            return 0
        texts = admitted.options.inputs if request.kind == JobKind.EMBED else None
        most = job_ste_micro(terms.profile, Usage(request.prompt_tokens, 0, request.max_tokens, 0), texts)
        now = self._tools.clock.now_ms()
        await self._reservations.check(Digest(request.reservation), Address(request.client), most, now)
        return most

    async def _read_prompt(self, talk: JobStream, sealed: Sealed, chunks: int) -> bytes:
        """The unsealed prompt. One deadline for all of it, however it is dripped. Raises: StreamEnded."""
        try:
            async with asyncio.timeout(PROMPT_TIMEOUT_S):
                return b"".join(
                    [sealed.unseal((await talk.expect(PromptChunk, ASK_TIMEOUT_S)).sealed) for _ in range(chunks)]
                )
        except TimeoutError as exc:
            raise StreamEnded(f"the prompt was not complete in {PROMPT_TIMEOUT_S:g} s") from exc

    async def _accept_and_deliver(
        self,
        talk: JobStream,
        frame: Request,
        admitted: Admitted,
        nonce: bytes,
        sealed: Sealed,
        prompt: tuple[int, ...],
        reserved: int,
    ) -> None:
        """`reserved`: micro-STE taken from a right; what was not computed of it goes back, however the job ends.

        Raises: as `_serve`.
        """
        tools = self._tools
        delivery: Delivery | None = None
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(lambda: self._give_back(admitted, reserved, delivery))
            tokens: TokenStream | None = None
            if admitted.request.kind != JobKind.EMBED:
                tokens = await stack.enter_async_context(contextlib.aclosing(await self._submit(admitted, prompt)))
            now = tools.clock.now_ms()
            check_tariff_now(admitted.tariff, now)
            self._epochs.check_open(now)
            self._accepted.accept(admitted.job_id, now)  # at once: from here on its epoch waits for it
            stack.callback(self._accepted.close, admitted.job_id)
            accept = Accept(Digest(admitted.job_id), Digest(nonce), admitted.seed, now)
            signature = tools.signer.sign(tools.domain, accept)
            opened = JobOpened(
                Role.PROVIDER,
                admitted.job_id,
                admitted.request,
                frame.signature,
                accept,
                signature,
                self._card.model,
                frame.options,
            )
            work = Work.start(
                admitted.job_id,
                admitted.request,
                admitted.options,
                admitted.tariff,
                self._card.profile,
                accept,
                block_heads(admitted.cache_salt, prompt) if admitted.cache_salt else (),
            )
            # SPEC 5.7: A provider that lost what it kept still charges it as cached
            due = self._promised.due(work.request, work.tariff, work.heads, accept.accepted_at)
            keeps = self._keeps and not admitted.request.is_private
            cut_ms = self._epochs.cut_ms(now)
            delivery = Delivery(tools, talk, sealed, work, due, keeps=keeps, cut_ms=cut_ms)
            kept = (PromptKept(Role.PROVIDER, admitted.job_id, frame.salt, prompt),) if keeps else ()
            await whole(tools.store.write(opened, *kept))
            try:
                await talk.send(Accepted(pack(accept), signature))
                if tokens is None:
                    finish = await delivery.run_vectors(self._embed(admitted, prompt))
                else:
                    finish = await delivery.run(tokens)
            finally:
                await whole(delivery.close(FinishReason.CANCELLED, "the client was gone before it could be accepted"))
        self.tokens_served += delivery.work.completion_tokens
        self.jobs_served += finish is not FinishReason.ERROR

    def _give_back(self, admitted: Admitted, reserved: int, delivery: Delivery | None) -> None:
        """Work that a right was asked for and that was not computed. A client that breaks off saves nothing by it."""
        if reserved:
            unused = max(0, reserved - (delivery.work.ste_micro() if delivery else 0))
            self._reservations.give_back(Digest(admitted.request.reservation), unused, self._tools.clock.now_ms())

    async def _submit(self, admitted: Admitted, prompt: tuple[int, ...]) -> TokenStream:
        """Raises: Refused."""
        with _engine_refusals():
            return await self._engine.submit(engine_request(admitted, prompt))

    async def _embed(self, admitted: Admitted, prompt: tuple[int, ...]) -> tuple[bytes, ...]:
        """Raises: Refused."""
        ends = list(itertools.accumulate(admitted.options.inputs))
        inputs = [prompt[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        with _engine_refusals():
            return await self._engine.embed(inputs, admitted.options.dimensions, urgency_of(admitted.request))

    async def handle_card(self, stream: Stream) -> None:
        """One stream of /tally/card/1: the tokenizer and template of the profile served here."""
        ask = frames.decode(await stream.receive(ASK_TIMEOUT_S))
        if not isinstance(ask, CardAsk):
            raise UnexpectedFrame(type(ask).__name__, "card")
        card = self._card
        if ask.profile_id != card.profile_id:
            await stream.send(frames.encode(Refuse(RefusalCode.UNKNOWN_MODEL, "that profile is not served here")))
        else:
            chunks = frames.chunked(card.tokenizer_json)
            head = CardHead(
                card.model,
                pack(card.profile),
                card.chat_template,
                card.special,
                card.eos_ids,
                card.max_context,
                len(chunks),
            )
            await stream.send(frames.encode(head))
            for chunk in chunks:
                await stream.send(frames.encode(CardChunk(chunk)))
        await stream.close()
