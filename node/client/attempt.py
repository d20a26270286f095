"""One attempt: one job with one provider, from quote to acknowledged END.

The walk of a token: sealed frame -> `_on_tokens` (opened, in order, into the work account) -> the caller; at each
receipt `_on_receipt` recomputes it, journals it with the voucher, and only then signs and answers. What does not
recompute is kept as evidence, and nothing beyond the last good increment is paid.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from msgspec import structs

from incentives.ledger import AckSigned, JobClosed, JobOpened, OutputKept, PromptKept, Role
from incentives.prefixes import Prefixes
from node.client.accounts import Accounts
from node.client.vectors import check_vector
from node.crashpoints import crash_point, declare
from node.jobstream import JobStream
from node.ports import (
    Clock,
    Entropy,
    JobEvent,
    JobPaid,
    JobSpec,
    JobTokens,
    JobVectors,
    ModelCard,
    Store,
    Stream,
    StreamEnded,
    TransportError,
)
from node.whole import whole
from protocol.cache import block_heads
from protocol.eip712 import digest
from protocol.errors import ReceiptMismatch, Refused, RemoteProtocolError, UnexpectedFrame
from protocol.frames import (
    Abort,
    Accepted,
    Ack,
    Cancel,
    End,
    Frame,
    PromptChunk,
    Quote,
    QuoteAsk,
    Receipt,
    Refuse,
    Request,
    Tokens,
    Vectors,
    VoucherFrame,
    chunked,
    decode_batch,
    decode_vector,
)
from protocol.messages import Accept, JobRequest, ReceiptAck, WorkReceipt
from protocol.metering import Reasoning, opens_reasoning
from protocol.offers import CheckedOffer
from protocol.options import JobOptions, encode_options, options_hash
from protocol.packing import pack, unpack
from protocol.sampling import derive_seed
from protocol.sealing import BoxKey, Sealed
from protocol.session import Side, State
from protocol.signing import verify
from protocol.transcript import Leaf, prompt_hash, unpack_fp16
from protocol.units import BPS, INCREMENT_TOKENS, ZERO_DIGEST, Address, Digest, FinishReason, JobId, JobKind, Wei
from protocol.work import CLOCK_SLACK_MS, Work, check_receipt, most_up, nonce_commitment

log = logging.getLogger("tally.client")

QUOTE_TIMEOUT_S: Final = 2.0
"""A provider that has not quoted by then is passed over. Unit: s."""

ACCEPT_TIMEOUT_S: Final = 10.0
"""From the request to Accept. Unit: s. A provider journals and opens its nonce in milliseconds."""

VOUCHER_JOURNALED: Final = declare("client.voucher.journaled")
"""The voucher is on disk and counted; the provider does not have it yet."""

ACK_JOURNALED: Final = declare("client.ack.journaled")
"""The job is acknowledged and closed on disk; the provider does not know."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The stream that this attempt continues: the job that began it and its seed."""

    job_id: JobId
    seed: Digest


@dataclass(frozen=True, slots=True)
class Tools:
    """What every attempt needs; the same for all jobs of a client. `stall_s`: silence taken for a stall.

    `kept`: hashes of the tariffs known to be in the journal. `keeps_content`: prompts and transcripts stay there too,
    sealed, so that a job can be audited; private ones never do.
    """

    accounts: Accounts
    store: Store
    clock: Clock
    entropy: Entropy
    stall_s: float
    prefixes: Prefixes
    kept: set[Digest] = field(default_factory=set)
    keeps_content: bool = True


class Attempt:
    """Mutable state of one job with one provider. `acked`: output tokens vouched for; `tokens`: those received."""

    def __init__(
        self,
        tools: Tools,
        stream: Stream,
        offer: CheckedOffer,
        card: ModelCard,
        spec: JobSpec,
        ceiling: Wei,
        deadline_ms: int,
    ) -> None:
        self._tools = tools
        self.offer = offer
        self._card = card
        self._spec = spec
        self._ceiling = ceiling
        self._deadline_ms = deadline_ms
        self.talk = JobStream(stream, Side.CLIENT, tools.clock)
        self.provider = Address(offer.offer.provider)
        self.queue_ms = 0
        self.tokens: list[int] = []
        self._vectors: list[bytes] = []
        self.acked = 0
        self.seed = ZERO_DIGEST
        self.final: WorkReceipt | None = None
        self.last_digest = ZERO_DIGEST
        self._commitment = ZERO_DIGEST
        self._sealed: Sealed | None = None
        self._work: Work | None = None
        self._request: JobRequest | None = None
        self._paid = Wei(0)
        self._dimensions = spec.options.dimensions  # of every vector; 0 until the first shows what "all" is
        self._accepted_seen = 0
        self._cancel_sent = False
        self._promised = Wei(0)  # the last voucher of this attempt, cumulative
        self._opening: asyncio.Task[None] | None = None  # the job on its way into the journal
        self._closed = False

    # ------------------------------------------------------------------------------------------------------ agreement

    async def quote(self, prompt_tokens: int, max_tokens: int) -> None:
        """Ask for a quote. Raises: Refused, StreamEnded, RemoteProtocolError."""
        # SPEC 1.2: A client that reaches another key than the one that signed the offer hangs up.
        if self.talk.stream.peer_address != self.offer.node_key:
            raise RemoteProtocolError("the peer at the offer's address holds another key than the one that signed it")
        longest = max(self._spec.options.inputs, default=prompt_tokens)  # texts have the context to themselves
        session = self._tools.accounts.session.address
        await self.talk.send(QuoteAsk(session, self._card.profile_id, longest, max_tokens, self._spec.tier))
        frame = await self.talk.receive(QUOTE_TIMEOUT_S)
        if isinstance(frame, Refuse):
            raise Refused(frame.code, frame.reason)
        if not isinstance(frame, Quote):
            raise UnexpectedFrame(type(frame).__name__, "asked")
        if frame.tariff_hash != self.offer.tariff_hash:
            raise RemoteProtocolError("the quote names another tariff than the offer")
        self._commitment = Digest(frame.commitment)
        self.queue_ms = frame.queue_ms

    async def agree(self, prompt: tuple[int, ...], max_tokens: int, parent: Parent | None) -> JobId:
        """Reserve escrow, request, and check the acceptance; returns the job id.

        Raises: InsufficientFunds, Refused, StreamEnded, RemoteProtocolError, StoreError.
        """
        tools, accounts = self._tools, self._tools.accounts
        box = BoxKey.from_secret(tools.entropy.token(32))
        salt = tools.entropy.token(32)
        options = self._options(prompt, parent)
        encoded = encode_options(options)
        request = self._make_request(prompt, max_tokens, parent, box, salt, options_hash(encoded))
        job_id = JobId(digest(accounts.domain, request))
        signature = accounts.session.sign_digest(Digest(job_id))
        self._request = request
        await self._reserve(job_id, request)
        try:
            sealed = Sealed(box, self.offer.offer.box_key, we_are_client=True)
            plaintext = b"".join(token.to_bytes(4, "big") for token in prompt)
            chunks = [PromptChunk(sealed.seal(chunk)) for chunk in chunked(plaintext)]
            cache_salt = self._cache_salt()
            head = Request(pack(request), signature, self.offer.offer.box_key, salt, cache_salt, encoded, len(chunks))
            await self.talk.send(head, *chunks)
            accept, accept_signature = await self._accepted(job_id, request, parent)
        except BaseException:
            accounts.release(self.provider, job_id)
            raise
        self.seed = accept.seed
        self._sealed = sealed
        heads = block_heads(cache_salt, prompt) if cache_salt else ()
        self._work = Work.start(
            job_id, request, options, self.offer.tariff, self._card.profile, accept, heads, self._accepted_seen
        )
        opened = JobOpened(Role.CLIENT, job_id, request, signature, accept, accept_signature, self._spec.model, encoded)
        kept = (PromptKept(Role.CLIENT, job_id, salt, prompt),) if self._keeps else ()
        self._opening = asyncio.create_task(self._open(opened, *kept))
        return job_id

    async def _open(self, opened: JobOpened, *kept: PromptKept) -> None:
        """Journal the agreed job, while the provider reads the prompt. Raises: StoreError."""
        await self._keep_terms()
        await self._tools.store.write(opened, *kept)

    @property
    def _keeps(self) -> bool:
        return self._tools.keeps_content and not self._spec.private

    def _kept(self, step: int) -> tuple[OutputKept, ...]:
        """What receipt `step` is over, to be written with its voucher: the leaf under way, or the vectors."""
        assert self._work is not None
        if not self._keeps:
            return ()
        leaf = (Leaf.of(self._work.pending).to_bytes(),) if self._work.pending else ()
        content = tuple(self._vectors) or leaf
        return (OutputKept(Role.CLIENT, self.job_id, step, content),) if content else ()

    async def _opened(self) -> None:
        """Until the job is on disk, as it is before anything is signed for it. Raises: StoreError."""
        if self._opening is not None:
            await asyncio.shield(self._opening)

    async def _keep_terms(self) -> None:
        """Price sheet and profile beside the receipts that name them, so that they verify without anybody's help."""
        kept = self._tools.kept
        if self.offer.tariff_hash in kept:
            return
        key = f"tariff/{self.offer.tariff_hash.hex()}"
        if await self._tools.store.get_value(key) is None:
            envelope = self.offer.envelope
            await self._tools.store.put_value(key, envelope.tariff + envelope.tariff_signature)
        await self._tools.store.put_value(f"profile/{self._card.profile_id.hex()}", pack(self._card.profile))
        kept.add(self.offer.tariff_hash)

    def _options(self, prompt: tuple[int, ...], parent: Parent | None) -> JobOptions:
        """The caller's options, and what only this attempt knows of its prompt."""
        written = len(prompt) - len(self._spec.prompt) if parent else 0
        return structs.replace(
            self._spec.options,
            continued=written,
            reasoning_open=self._spec.kind is not JobKind.EMBED and opens_reasoning(self._card.profile, prompt),
        )

    def _cache_salt(self) -> bytes:
        """Whose prefix cache this job shares: the caller's choice, none for private and embedding jobs, else ours."""
        if self._spec.private or self._spec.kind is JobKind.EMBED:
            return b""
        secret = self._tools.accounts.session.secret
        return self._spec.cache_salt or hashlib.sha256(b"tally/cache-salt/1" + secret + self.provider).digest()

    def _make_request(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        parent: Parent | None,
        box: BoxKey,
        salt: bytes,
        options: Digest,
    ) -> JobRequest:
        spec, sampling = self._spec, self._spec.sampling
        reserved = spec.reservation != ZERO_DIGEST
        discount = self.offer.tariff.reserved_discount_bps
        return JobRequest(
            provider=self.provider,
            client=self._tools.accounts.session.address,
            profile_id=self._card.profile_id,
            kind=spec.kind,
            prompt_hash=prompt_hash(salt, prompt),
            prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            temperature_micro=sampling.temperature_micro,
            top_p_micro=sampling.top_p_micro,
            top_k=sampling.top_k,
            options_hash=options,
            tier=spec.tier,
            is_private=spec.private,
            tariff_hash=self.offer.tariff_hash,
            base_bps=BPS - discount if reserved else self.offer.offer.base_bps,
            reservation=spec.reservation,
            price_ceiling=self._ceiling,
            client_nonce=Digest(self._tools.entropy.token(32)),
            provider_commitment=self._commitment,
            client_box_key=Digest(box.public),
            deadline=self._deadline_ms,
            parent_job=Digest(parent.job_id) if parent else ZERO_DIGEST,
            parent_seed=parent.seed if parent else ZERO_DIGEST,
        )

    async def _reserve(self, job_id: JobId, request: JobRequest) -> None:
        first = most_up(self.offer.tariff, request, INCREMENT_TOKENS)
        worst = most_up(self.offer.tariff, request, request.max_tokens)
        await self._tools.accounts.ensure(self.provider, job_id, first, worst)

    async def _accepted(self, job_id: JobId, request: JobRequest, parent: Parent | None) -> tuple[Accept, bytes]:
        frame = await self.talk.receive(ACCEPT_TIMEOUT_S)
        if isinstance(frame, Refuse):
            raise Refused(frame.code, frame.reason)
        if not isinstance(frame, Accepted):
            raise UnexpectedFrame(type(frame).__name__, "requested")
        self._accepted_seen = self.talk.received_at
        accept = unpack(Accept, frame.accept)
        verify(self._tools.accounts.domain, accept, frame.signature, self.offer.node_key)
        if bytes(accept.job_id) != bytes(job_id) or nonce_commitment(accept.provider_nonce) != self._commitment:
            raise RemoteProtocolError("the acceptance is of another job, or opens another nonce than was quoted")
        seed = parent.seed if parent else derive_seed(job_id, request.client_nonce, accept.provider_nonce)
        if accept.seed != seed:
            raise RemoteProtocolError("the acceptance states another seed than the nonces give")
        if abs(accept.accepted_at - self._tools.clock.now_ms()) > CLOCK_SLACK_MS:
            raise RemoteProtocolError(f"the provider's clock is more than {CLOCK_SLACK_MS} ms from ours")
        return accept, frame.signature

    # ------------------------------------------------------------------------------------------------------- delivery

    @property
    def total(self) -> Wei:
        """What is owed for this attempt: its last vouched receipt, in wei."""
        return self._paid

    def reasoning_of(self, output: Sequence[int]) -> int:
        """How many of the stream's output tokens lie in reasoning blocks, whoever wrote them."""
        profile = self._card.profile
        opened = opens_reasoning(profile, self._spec.prompt)
        return Reasoning(profile.reasoning_start, profile.reasoning_end, opened).take(output).tokens

    @property
    def job_id(self) -> JobId:
        """Valid once `agree` returned."""
        assert self._work is not None
        return self._work.job_id

    @property
    def _patience_s(self) -> float:
        """Silence taken for a stall. Batch work waits for its turn as long as its deadline lets it."""
        stall_s = self._tools.stall_s
        if self._spec.kind is not JobKind.BATCH:
            return stall_s
        return max(stall_s, (self._deadline_ms - self._tools.clock.now_ms()) / 1000)

    async def next_events(self) -> list[JobEvent]:
        """Handle one frame; `final` is set once END was acknowledged.

        Raises: StreamEnded (stall, death, EOF without END), RemoteProtocolError, Refused (the provider aborted),
        Overspend, StoreError.
        """
        frame = await self.talk.receive(self._patience_s)
        if isinstance(frame, Tokens):  # taken in without waiting for anything, so it cannot stop halfway
            if self._opening is not None and self._opening.done():
                self._opening.result()  # a journal that could not be written ends the job
            return [self._on_tokens(frame.sealed)]
        return await whole(self._handle(frame))

    async def _handle(self, frame: Frame) -> list[JobEvent]:
        match frame:
            case Tokens():
                return [self._on_tokens(frame.sealed)]
            case Vectors():
                return [self._on_vector(frame.sealed)]
            case Receipt():
                return [await self._on_receipt(unpack(WorkReceipt, frame.receipt), frame.signature)]
            case End():
                return [await self._on_end(unpack(WorkReceipt, frame.receipt), frame.signature)]
            case Abort():
                raise Refused(frame.code, frame.reason)
            case _:
                raise UnexpectedFrame(type(frame).__name__, self.talk.conversation.state)

    def _on_tokens(self, sealed: bytes) -> JobTokens:
        assert self._work is not None and self._sealed is not None
        batch = decode_batch(self._sealed.unseal(sealed))
        if batch.start != self._work.completion_tokens:
            raise RemoteProtocolError(f"tokens from {batch.start} where {self._work.completion_tokens} should follow")
        asked = self._spec.options.alternatives
        if any(len(likeliest) > asked for likeliest in batch.alternatives):
            raise RemoteProtocolError(f"more than the {asked} alternatives that were asked for")
        alternatives = tuple(
            tuple((token_id, unpack_fp16(logprob)[0]) for token_id, logprob in likeliest)
            for likeliest in batch.alternatives
        )
        leaf = Leaf(batch.token_ids, batch.logprobs, batch.projections, batch.routing)
        self._work = self._work.take(tuple(leaf.records()), self.talk.received_at)
        self.tokens.extend(batch.token_ids)  # last: what the caller is not shown, no continuation starts after
        return JobTokens(tuple(batch.token_ids), unpack_fp16(batch.logprobs), alternatives)

    def _on_vector(self, sealed: bytes) -> JobVectors:
        assert self._work is not None and self._sealed is not None
        batch = decode_vector(self._sealed.unseal(sealed))
        check_vector(batch.vector, self._dimensions)
        self._work = self._work.take_vector(batch.index, batch.vector, self.talk.received_at)
        self._dimensions = len(batch.vector) // 4
        if self._keeps:
            self._vectors.append(batch.vector)
        return JobVectors((batch.vector,))

    async def _check(self, receipt: WorkReceipt, signature: bytes, *, final: bool) -> Digest:
        """Recompute, keep evidence of what does not. `final`: it came with END.

        Raises: BadSignature, ReceiptMismatch.
        """
        assert self._work is not None
        verify(self._tools.accounts.domain, receipt, signature, self.offer.node_key)
        try:
            if receipt.is_final != final:
                raise ReceiptMismatch("is_final", receipt.is_final, final)
            after, receipt_digest = check_receipt(
                self._tools.accounts.domain, self._work, receipt, self.talk.received_at
            )
            self._tools.prefixes.check(receipt, self.offer.tariff, self._work.heads)
            self._check_stop(receipt)
            self._check_reason(FinishReason(receipt.finish_reason))
            self._check_vouched(receipt)
            if receipt.total > self._ceiling:
                raise ReceiptMismatch("total", receipt.total, f"at most {self._ceiling}")
        except RemoteProtocolError as exc:
            evidence = pack(receipt) + signature + str(exc).encode()
            await self._tools.store.put_value(f"evidence/{self.job_id.hex()}/{receipt.step}", evidence)
            raise
        self._work = after
        self.last_digest = receipt_digest
        return receipt_digest

    @property
    def stopped(self) -> bool:
        """Whether the last token received ends the text."""
        return bool(self.tokens) and self.tokens[-1] in {*self._card.eos_ids, *self._spec.options.stop_ids}

    def _check_stop(self, receipt: WorkReceipt) -> None:
        """STOP means the last token is EOS or one of the stop ids, and no earlier token was."""
        if self._spec.kind is JobKind.EMBED:
            return
        stops = {*self._card.eos_ids, *self._spec.options.stop_ids}
        if (receipt.finish_reason == FinishReason.STOP) and not self.stopped:
            raise ReceiptMismatch("finish_reason", "stop", "no stop token")
        if receipt.finish_reason == FinishReason.OPEN and self.stopped:  # a continuation would write on after it
            raise ReceiptMismatch("finish_reason", "open", "the end of the text")
        if any(token in stops for token in self.tokens[:-1]):
            raise ReceiptMismatch("completion_tokens", receipt.completion_tokens, "tokens after a stop token")

    def _check_vouched(self, receipt: WorkReceipt) -> None:
        """The voucher it says it holds: at least the one that released these tokens, at most our highest."""
        highest = self._tools.accounts.channel(self.provider).vouched
        if not self._promised <= receipt.vouched <= highest:
            raise ReceiptMismatch("vouched", receipt.vouched, f"{self._promised} to {highest}")

    def _check_reason(self, finish: FinishReason) -> None:
        """A reason to end that only we can know to be false. Raises: ReceiptMismatch."""
        if finish is FinishReason.CANCELLED and not self._cancel_sent:
            raise ReceiptMismatch("finish_reason", "cancelled", "not cancelled by us")
        if finish is FinishReason.ESCROW_EXHAUSTED and self._covers_more():
            raise ReceiptMismatch("finish_reason", "escrow exhausted", "a channel that covers the next increment")

    def _covers_more(self) -> bool:
        """Whether our channel, less what our other jobs reserve, holds the worst case of the next increment."""
        assert self._work is not None
        upto = self._work.completion_tokens + INCREMENT_TOKENS
        worst = most_up(self.offer.tariff, self._work.request, upto)
        channel = self._tools.accounts.channel(self.provider)
        return channel.free + channel.reserved.get(self.job_id, 0) >= max(0, worst - self._paid)

    async def _vouch(self, receipt: WorkReceipt, signature: bytes, *, final: bool) -> tuple[VoucherFrame, Digest]:
        await self._opened()
        before = self.total
        kept = self._kept(receipt.step)  # of the account before the receipt closes its leaf
        receipt_digest = await self._check(receipt, signature, final=final)
        fresh = tuple(self.tokens[self.acked :])
        voucher, voucher_signature = await self._tools.accounts.vouch(
            self.provider, self.job_id, before, receipt, receipt_digest, signature, fresh, kept
        )
        self.acked = len(self.tokens)
        self._paid = Wei(receipt.total)
        self._promised = Wei(voucher.cumulative)
        crash_point(VOUCHER_JOURNALED)
        return VoucherFrame(receipt.step, pack(voucher), voucher_signature), receipt_digest

    async def _on_receipt(self, receipt: WorkReceipt, signature: bytes) -> JobPaid:
        came_at = self.talk.received_at
        frame, _ = await self._vouch(receipt, signature, final=False)
        await self.talk.send(frame)
        self._work = self._work.waited(self._tools.clock.now_ms() - came_at) if self._work else None
        return JobPaid(Wei(receipt.total))

    async def _on_end(self, receipt: WorkReceipt, signature: bytes) -> JobPaid:
        frame, receipt_digest = await self._vouch(receipt, signature, final=True)
        ack = ReceiptAck(receipt_digest)
        finish = FinishReason(receipt.finish_reason)
        await self._tools.store.write(
            AckSigned(self.job_id, ack), JobClosed(Role.CLIENT, self.job_id, finish, Wei(receipt.total), "")
        )
        crash_point(ACK_JOURNALED)
        self._closed = True
        self.final = receipt
        self._tools.prefixes.remember(receipt)
        self._tools.accounts.release(self.provider, self.job_id)
        session = self._tools.accounts.session
        # The job is paid and closed whether the acknowledgement arrives or not: a later voucher covers it.
        with contextlib.suppress(TransportError):
            await self.talk.send(
                Ack(pack(ack), session.sign(self._tools.accounts.domain, ack), frame.voucher, frame.signature)
            )
        return JobPaid(Wei(receipt.total))

    # -------------------------------------------------------------------------------------------------------- endings

    async def cancel(self, limit_s: float) -> None:
        """Stop the job and pay for what was delivered. Raises: what `next_events` raises."""
        if self.talk.conversation.state is State.RUNNING:
            self._cancel_sent = True
            await self.talk.send(Cancel())
        deadline = self._tools.clock.monotonic() + limit_s
        while self.final is None:
            if self._tools.clock.monotonic() > deadline:
                raise StreamEnded(f"the provider did not end the cancelled job in {limit_s:g} s")
            await self._handle(await self.talk.receive(limit_s))

    async def close(self, finish: FinishReason, detail: str) -> None:
        """Make the job terminal in the journal if END did not. Idempotent. Raises: StoreError."""
        if self._work is None or self._closed:
            return
        self._closed = True
        self._tools.accounts.release(self.provider, self.job_id)
        await self._opened()
        await self._tools.store.write(JobClosed(Role.CLIENT, self.job_id, finish, self.total, detail))
