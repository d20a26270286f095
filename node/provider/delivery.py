"""Delivery of one accepted job: engine tokens out, receipts out, vouchers in, until END, cancel, or a dead client.

The walk of a token: engine -> `_pump` (buffer) -> `_deliver` (sealed Tokens frame, work account) -> at 32 tokens a
receipt (journal, sign, send) -> nothing more leaves until its voucher is checked and journaled (`_on_voucher`).
So at most one increment is ever delivered and not paid for; the engine may run one increment ahead meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Final

from incentives.ledger import AckReceived, JobClosed, OutputKept, ReceiptIssued, Role
from node.crashpoints import crash_point, declare
from node.jobstream import JobStream
from node.ports import Clock, EngineToken, Store, StreamEnded, TokenStream, UnfitRequest
from node.provider.books import Books
from node.whole import whole
from protocol.eip712 import Domain, digest
from protocol.errors import Overspend, Refused, RemoteProtocolError, UnexpectedFrame
from protocol.frames import (
    Ack,
    Cancel,
    End,
    Frame,
    Receipt,
    RefusalCode,
    TokenBatch,
    Tokens,
    VectorBatch,
    Vectors,
    VoucherFrame,
    encode_batch,
    encode_vector,
)
from protocol.messages import ReceiptAck, Voucher, WorkReceipt
from protocol.packing import pack, unpack
from protocol.sealing import Sealed
from protocol.signing import Signer, verify
from protocol.transcript import Leaf, Row
from protocol.units import INCREMENT_TOKENS, Address, Digest, FinishReason, Wei
from protocol.work import Work, most_up

log = logging.getLogger("tally.provider.delivery")

COALESCE_S: Final = 0.02
"""Tokens are gathered for this long before a frame leaves. Unit: s. Below what a reader notices; doubling it halves
the frames and adds as much to the time between tokens. The first token of a job never waits."""

VOUCHER_TIMEOUT_S: Final = 60.0
"""How long a live client may keep an increment waiting (a slow reader). Unit: s. Its slot is held meanwhile."""

ACK_TIMEOUT_S: Final = 10.0
"""How long we wait for the final acknowledgement. Unit: s. Without it the last increment is unpaid, not disputed."""

CUT_GRACE_S: Final = 0.5
"""After the time by which a job must be over, for saying so; then it is broken off wherever it hangs. Unit: s. A client
that pings and reads nothing could otherwise hold up the commitment of its whole epoch, at the provider's cost."""

FOREVER_MS: Final = 1 << 62
"""No limit of our own on how long a job may take. Unit: Unix ms."""

RECEIPT_JOURNALED: Final = declare("provider.receipt.journaled")
"""A receipt is on disk; its signature does not exist yet."""

RECEIPT_SENT: Final = declare("provider.receipt.sent")
"""A receipt is out; its voucher is not in."""

VOUCHER_JOURNALED: Final = declare("provider.voucher.journaled")
"""A voucher is on disk and counted; no token was released for it."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What delivery needs from its provider; the same for every job."""

    domain: Domain
    signer: Signer
    books: Books
    store: Store
    clock: Clock


class Delivery:
    """One job, from acceptance to its terminal state. `run` returns the finish reason that was journaled.

    `promised`: tokens of the prompt that are charged as cached at least. `keeps`: what is delivered is kept, beside its
    prompt. `cut_ms`: Unix ms by which the job must be over, whatever its deadline.
    """

    def __init__(
        self,
        tools: Tools,
        talk: JobStream,
        sealed: Sealed,
        work: Work,
        promised: int,
        *,
        keeps: bool = False,
        cut_ms: int = FOREVER_MS,
    ) -> None:
        self._tools = tools
        self._talk = talk
        self._sealed = sealed
        self._work = work
        self._promised = promised
        self._keeps = keeps
        self._cut_ms = cut_ms
        self._client = Address(work.request.client)
        self._began = tools.clock.monotonic()
        self._rows: list[EngineToken] = []
        self._enough = 1  # tokens in the buffer that are worth waking `_deliver` for
        self._vectors: tuple[bytes, ...] = ()
        self._engine_finish = FinishReason.OPEN
        self._failure: Exception | None = None
        self._wake = asyncio.Event()
        self._space = asyncio.Event()
        self._receipted_at = 0.0  # monotonic
        self._cancelled = False
        self._unvouched: WorkReceipt | None = None  # the receipt whose voucher we wait for
        self._acked = Wei(0)  # the job's total at its last vouched receipt
        self._client_failed = False
        self._closed = False
        self._covered = False  # the final receipt needs no new voucher
        self._acknowledged = asyncio.Event()

    @property
    def work(self) -> Work:
        """The account as it stands."""
        return self._work

    async def run(self, tokens: TokenStream) -> FinishReason:
        """Raises: RemoteProtocolError when the client broke the protocol, Refused when what it asked for turned out
        impossible, StoreError; the job is closed either way."""
        return await self._run(self._pump(tokens), self._deliver)

    async def run_vectors(self, vectors: Coroutine[None, None, tuple[bytes, ...]]) -> FinishReason:
        """The same for an embedding job, whose output is there all at once. Raises: Refused as well."""
        return await self._run(self._embed(vectors), self._deliver_vectors)

    async def _run(
        self, source: Coroutine[None, None, None], deliver: Callable[[], Awaitable[FinishReason]]
    ) -> FinishReason:
        pump = asyncio.create_task(source)
        reader = asyncio.create_task(self._read())
        finish, detail = FinishReason.ERROR, ""
        try:
            async with asyncio.timeout(self._until_cut() + CUT_GRACE_S):
                finish = await deliver()
                await self._end(finish)
        except TimeoutError as exc:
            self._client_failed = True
            raise self._too_long() from exc
        except StreamEnded as exc:
            self._client_failed = True
            finish, detail = FinishReason.CANCELLED, f"the client vanished: {exc}"
        except RemoteProtocolError as exc:
            self._client_failed = True
            detail = str(exc)
            raise
        except UnfitRequest as exc:
            self._client_failed = True  # else a grammar that breaks off before each receipt would buy all for nothing
            detail = str(exc)
            raise Refused(RefusalCode.BAD_REQUEST, detail) from exc
        finally:
            for task in (pump, reader):
                task.cancel()
            await asyncio.gather(pump, reader, return_exceptions=True)
            await whole(self.close(finish, detail))
        return finish

    async def close(self, finish: FinishReason, detail: str) -> None:
        """Make the job terminal: release its escrow, remember what its client owes, journal. Idempotent.

        Raises: StoreError.
        """
        if self._closed:
            return
        self._closed = True
        self._tools.books.release(self._client, self._work.job_id)
        if self._client_failed:
            self._tools.books.lose(self._client, Wei(self._work.cost(0).total - self._acked))
        await self._tools.store.write(JobClosed(Role.PROVIDER, self._work.job_id, finish, self._acked, detail))

    # -------------------------------------------------------------------------------------------------- what comes in

    async def _pump(self, tokens: TokenStream) -> None:
        """Engine tokens into the buffer, never more than one increment ahead of delivery."""
        try:
            async for token in tokens:
                while len(self._rows) >= INCREMENT_TOKENS:
                    self._space.clear()
                    await self._space.wait()
                if not self._work.completion_tokens and not self._rows:
                    self._work = self._work.hit(max(token.cached_tokens, self._promised), kept=token.kept)
                self._rows.append(token)
                self._engine_finish = token.finish
                if len(self._rows) >= self._enough or token.finish is not FinishReason.OPEN:
                    self._wake.set()
        except Exception as exc:  # noqa: BLE001 - whatever the engine raises ends this job, and only this job
            self._fail(exc)

    async def _embed(self, vectors: Coroutine[None, None, tuple[bytes, ...]]) -> None:
        try:
            self._vectors = await vectors
            self._wake.set()
        except Exception as exc:  # noqa: BLE001 - whatever the engine raises ends this job, and only this job
            self._fail(exc)

    async def _read(self) -> None:
        """Frames of the client, until it closes."""
        try:
            while True:
                await whole(self._on_frame(await self._talk.receive()))
                self._wake.set()
        except Exception as exc:  # noqa: BLE001 - handed to the delivering task, which raises it
            self._fail(exc)

    async def _on_frame(self, frame: Frame) -> None:
        match frame:
            case VoucherFrame():
                await self._on_voucher(frame.step, unpack(Voucher, frame.voucher), frame.signature)
            case Cancel():
                self._cancelled = True
            case Ack():
                await self._on_ack(frame)
            case _:
                raise UnexpectedFrame(type(frame).__name__, self._talk.conversation.state)

    def _fail(self, exc: Exception) -> None:
        self._failure = self._failure or exc
        self._acknowledged.set()
        self._wake.set()

    async def _on_voucher(self, step: int, voucher: Voucher, signature: bytes) -> None:
        receipt = self._unvouched
        if receipt is None or step != receipt.step:
            raise RemoteProtocolError(f"a voucher for receipt {step}, which is not the one outstanding")
        await self._tools.books.take_voucher(
            self._client, self._work.job_id, step, self._acked, Wei(receipt.total), voucher, signature
        )
        self._acked = Wei(receipt.total)
        self._unvouched = None
        if not receipt.is_final:
            self._work = self._work.waited(int((self._tools.clock.monotonic() - self._receipted_at) * 1000))
        crash_point(VOUCHER_JOURNALED)

    async def _on_ack(self, frame: Ack) -> None:
        ack = unpack(ReceiptAck, frame.ack)
        receipt = self._unvouched
        if receipt is None or not receipt.is_final or ack.receipt != self._work.previous:
            raise RemoteProtocolError("an acknowledgement of another receipt than the final one")
        verify(self._tools.domain, ack, frame.signature, self._client)
        if not self._covered:
            await self._on_voucher(receipt.step, unpack(Voucher, frame.voucher), frame.voucher_signature)
        self._unvouched = None
        await self._tools.store.write(AckReceived(self._work.job_id, ack, frame.signature))
        self._acknowledged.set()

    # -------------------------------------------------------------------------------------------------- what goes out

    async def _deliver(self) -> FinishReason:
        """Tokens and interim receipts until there is a reason to end. Raises what ended the stream."""
        sent_at = 0.0
        while True:
            # SPEC 4.3: no token of the next leaf leaves before the voucher for this one has been checked
            await self._vouched()
            if self._work.step and not self._work.pending and not await self._reserve_next():
                return FinishReason.ESCROW_EXHAUSTED
            await self._tokens_to_send(sent_at)
            if self._cancelled:
                return FinishReason.CANCELLED
            if self._until_deadline() <= 0:
                return self._out_of_time()
            if not self._rows:
                continue  # woken a little before the deadline
            await self._send_tokens()
            sent_at = self._tools.clock.monotonic()
            if not self._rows and self._engine_finish is not FinishReason.OPEN:
                return self._engine_finish
            if self._work.room == 0:
                await self._send_receipt()

    async def _deliver_vectors(self) -> FinishReason:
        """One frame a text. Raises: what ended the stream."""
        while not (self._vectors or self._cancelled) and self._until_deadline() > 0:
            await self._wait(self._until_deadline(), lambda: bool(self._vectors) or self._cancelled)
        if self._cancelled:
            return FinishReason.CANCELLED
        if not self._vectors:
            return self._out_of_time()
        for index, vector in enumerate(self._vectors):
            self._work = self._work.take_vector(index, vector, self._now_ms())
            await self._talk.send(Vectors(self._sealed.seal(encode_vector(VectorBatch(index, vector)))))
        return FinishReason.STOP

    async def _vouched(self) -> None:
        """Until no receipt is outstanding. A client that cancels still vouches for what it was receipted."""
        await self._wait(min(VOUCHER_TIMEOUT_S, self._until_cut()), lambda: self._unvouched is None)
        if self._unvouched is not None:
            raise StreamEnded(f"no voucher for receipt {self._unvouched.step} in time")

    async def _tokens_to_send(self, sent_at: float) -> None:
        """Until there are tokens and the last frame is COALESCE_S old, or a leaf is full, or the job must end."""
        self._enough = 1
        await self._wait(self._until_deadline(), lambda: bool(self._rows) or self._cancelled)
        gather = min(sent_at + COALESCE_S - self._tools.clock.monotonic(), self._until_deadline())
        if self._work.completion_tokens and gather > 0:
            self._enough = self._work.room
            await self._wait(gather, self._worth_sending)

    def _worth_sending(self) -> bool:
        full = len(self._rows) >= self._work.room
        return full or self._engine_finish is not FinishReason.OPEN or self._cancelled

    def _now_ms(self) -> int:
        """The job's own clock, Unix ms: set at its acceptance, and running on evenly from there.

        A machine's clock is set forward and back. Receipts that followed it could have a first token before the job,
        an end before the first token, or a deadline that had not come: an audit would call each of them forged.
        """
        # SPEC 4.4: runs on evenly from there, whatever the machine's clock is set to
        return self._work.received_at + int((self._tools.clock.monotonic() - self._began) * 1000)

    def _until_deadline(self) -> float:
        return min((self._work.request.deadline - self._now_ms()) / 1000, self._until_cut())

    def _until_cut(self) -> float:
        return (self._cut_ms - self._tools.clock.now_ms()) / 1000  # by the clock that commitments are made by

    def _out_of_time(self) -> FinishReason:
        """DEADLINE, when it is the client's. Raises: Refused when it is ours: the job's epoch must be committed to."""
        # SPEC 8.6: a job that is not over by then is aborted
        if self._work.request.deadline <= self._now_ms():
            return FinishReason.DEADLINE
        raise self._too_long()

    def _too_long(self) -> Refused:
        reason = (
            "the job ran longer than the epoch it belongs to can be committed to; what was vouched for stands, and "
            "another job can go on from there"
        )
        return Refused(RefusalCode.BUSY, reason)

    async def _wait(self, limit_s: float, ready: Callable[[], bool]) -> None:
        """Until `ready()` or the limit. Raises: whatever ended the stream or the engine meanwhile."""
        if not (ready() or self._failure):  # the common case needs no timer
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, limit_s)):
                    while not (ready() or self._failure):
                        self._wake.clear()
                        await self._wake.wait()
        if self._failure:
            raise self._failure

    async def _reserve_next(self) -> bool:
        """Hold escrow for the next increment before a token of it leaves; False when it does not cover one."""
        work = self._work
        worst = most_up(work.tariff, work.request, work.completion_tokens + INCREMENT_TOKENS)
        needed = Wei(max(0, worst - self._acked))
        self._tools.books.release(self._client, work.job_id)
        await self._tools.books.confirm(self._client, needed)  # a top-up we have not seen yet counts
        try:
            self._tools.books.reserve(self._client, work.job_id, needed)
        except Overspend as exc:
            log.info("job %s ends at its escrow: %s", work.job_id.hex()[:16], exc)
            return False
        return True

    async def _send_tokens(self) -> None:
        tokens = self._rows[: self._work.room]
        del self._rows[: len(tokens)]
        self._space.set()
        start = self._work.completion_tokens
        rows = tuple(Row(t.token_id, t.logprob, t.projection, t.routing) for t in tokens)
        self._work = self._work.take(rows, self._now_ms())
        batch = TokenBatch(
            start,
            tuple(row.token_id for row in rows),
            b"".join(row.logprob for row in rows),
            b"".join(row.projection for row in rows),
            b"".join(row.routing for row in rows),
            tuple(t.alternatives for t in tokens) if self._work.options.alternatives else (),
        )
        await self._talk.send(Tokens(self._sealed.seal(encode_batch(batch))))

    async def _issue(self, finish: FinishReason) -> tuple[WorkReceipt, bytes]:
        """Make the receipt, journal it, and only then sign it."""
        finished_at = 0 if finish is FinishReason.OPEN else self._now_ms()
        vouched = self._tools.books.channel(self._client).vouched
        content = self._content() if self._keeps else ()
        work, receipt = self._work.receipt(finish, finished_at, vouched)
        receipt_digest = digest(self._tools.domain, receipt)
        kept = (OutputKept(Role.PROVIDER, self._work.job_id, receipt.step, content),) if content else ()
        # SPEC 4.5: The provider writes a receipt to disk and syncs before it signs it
        await self._tools.store.write(ReceiptIssued(receipt_digest, receipt), *kept)
        self._work = work.sealed(receipt_digest)
        if receipt.is_final:
            job_id, total = self._work.job_id, Wei(receipt.total)
            self._covered = await self._tools.books.cover(self._client, job_id, receipt.step, self._acked, total)
            self._acked = total if self._covered else self._acked
        self._unvouched = receipt
        self._receipted_at = self._tools.clock.monotonic()
        crash_point(RECEIPT_JOURNALED)
        return receipt, self._tools.signer.sign_digest(Digest(receipt_digest))

    def _content(self) -> tuple[bytes, ...]:
        """What the next receipt is over beyond the last one: its leaf, or an embedding job's vectors."""
        if self._work.embeds:
            return self._vectors[: self._work.transcript.leaves]
        return (Leaf.of(self._work.pending).to_bytes(),) if self._work.pending else ()

    async def _send_receipt(self) -> None:
        receipt, signature = await self._issue(FinishReason.OPEN)
        await self._talk.send(Receipt(pack(receipt), signature))
        crash_point(RECEIPT_SENT)

    async def _end(self, finish: FinishReason) -> None:
        """The final receipt out, its acknowledgement in. Raises: StreamEnded, RemoteProtocolError."""
        receipt, signature = await self._issue(finish)
        await self._talk.send(End(pack(receipt), signature))
        crash_point(RECEIPT_SENT)
        try:
            async with asyncio.timeout(ACK_TIMEOUT_S):
                await self._acknowledged.wait()
        except TimeoutError as exc:
            raise StreamEnded(f"the final receipt was not acknowledged in {ACK_TIMEOUT_S:g} s") from exc
        if self._failure and self._unvouched is not None:
            raise self._failure
