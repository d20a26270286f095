"""What a hostile or unlucky peer tries on the paid path, on the twins: it costs that peer, and nobody else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from incentives.ledger import Role
from node.jobstream import JobStream
from node.ports import EngineRequest, InsufficientFunds, JobDone, JobFailed, JobStarted, JobTokens, StreamEnded
from node.provider.delivery import Delivery
from protocol.frames import Ack
from protocol.units import BPS, INCREMENT_TOKENS, FinishReason
from tests.spine.lab import Market, idle, run, spec, until
from tests.twins.engine_twin import EngineTwin

PROMPT_COST = 4 * 10**10
TOKEN = 10**11


async def test_payer_that_never_vouches_is_soon_refused() -> None:
    """Each job may lose one increment; a channel that only ever loses them is not served on."""
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()

        refused = False
        for _ in range(8):
            job = buyer.router.run(spec(64))
            got = 0
            try:
                async for event in job:
                    got += len(event.token_ids) if isinstance(event, JobTokens) else 0
                    if got >= INCREMENT_TOKENS:
                        break
            except InsufficientFunds:
                refused = True
                break
            for stream in list(market.network._streams):
                await stream.reset()
            await job.aclose()  # type: ignore[attr-defined]
            await idle(seller)
        assert refused
        assert seller.engine.emitted <= 5 * 3 * INCREMENT_TOKENS


async def test_end_that_says_cancelled_though_nobody_cancelled_is_not_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()

        async def lie(self: Delivery) -> FinishReason:
            return FinishReason.CANCELLED

        monkeypatch.setattr(Delivery, "_deliver", lie)
        with pytest.raises(JobFailed, match="cancelled"):
            await run(buyer, spec(64))
        assert buyer.accounts.spent == 0
        await idle(seller)


@pytest.mark.parametrize("reason", [FinishReason.ESCROW_EXHAUSTED, FinishReason.ERROR])
async def test_end_for_a_reason_that_is_false_is_not_paid(
    reason: FinishReason, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        seller.cheats = True

        async def lie(self: Delivery) -> FinishReason:
            return reason

        monkeypatch.setattr(Delivery, "_deliver", lie)
        with pytest.raises(JobFailed):
            await run(buyer, spec(64))
        assert buyer.accounts.spent == 0


async def test_acknowledgement_that_cannot_be_sent_starts_no_second_job(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as market:
        await market.seller()
        await market.seller()
        buyer = await market.buyer()
        send = JobStream.send

        async def cut(self: JobStream, *outgoing: Any) -> None:
            if any(isinstance(frame, Ack) for frame in outgoing):
                raise StreamEnded("cut before the acknowledgement")
            await send(self, *outgoing)

        monkeypatch.setattr(JobStream, "send", cut)
        tokens, done, events = await run(buyer, spec(70))
        assert len(tokens) == 70 and done.completion_tokens == 70
        assert len([event for event in events if isinstance(event, JobStarted)]) == 1
        assert buyer.accounts.spent == done.cost


class BrokenEngine(EngineTwin):
    """Fails right after the first increment, while its receipt is out."""

    async def _generate(self, request: EngineRequest) -> Any:
        async for token in super()._generate(request):
            if self.emitted > INCREMENT_TOKENS:
                raise RuntimeError("a kernel failed")
            yield token


async def test_engine_that_fails_while_a_receipt_is_out_is_failed_over() -> None:
    async with Market() as market:
        await market.seller(engine=BrokenEngine(), completion_price=TOKEN // 2)
        await market.seller()
        buyer = await market.buyer()
        tokens, done, events = await run(buyer, spec(100))
        assert len(tokens) == 100 and done.finish is FinishReason.LENGTH
        assert len([event for event in events if isinstance(event, JobStarted)]) == 2


async def test_slow_reader_does_not_make_an_honest_provider_look_false() -> None:
    async with Market() as market:
        await market.seller(standard_ttft_ms=60_000, standard_tpot_ms=60_000, standard_refund_bps=BPS)
        buyer = await market.buyer()
        done: JobDone | None = None
        async for event in buyer.router.run(spec(70)):
            if isinstance(event, JobStarted | JobTokens) and market.clock.ahead_s < 30:
                await asyncio.sleep(0.05)
                market.clock.ahead_s += 10
            done = event if isinstance(event, JobDone) else done
        assert done is not None and done.completion_tokens == 70 and done.refund == 0


async def test_vouchers_held_back_do_not_count_as_a_slow_provider() -> None:
    async with Market() as market:
        await market.seller(standard_ttft_ms=5_000, standard_tpot_ms=20, standard_refund_bps=BPS)
        buyer = await market.buyer()
        done: JobDone | None = None
        seen = 0
        async for event in buyer.router.run(spec(100)):
            seen += len(event.token_ids) if isinstance(event, JobTokens) else 0
            if isinstance(event, JobTokens) and seen % INCREMENT_TOKENS == 0:
                await asyncio.sleep(0.8)
            done = event if isinstance(event, JobDone) else done
        assert done is not None and done.refund == 0 and done.cost == PROMPT_COST + 100 * TOKEN


async def test_nothing_is_computed_far_ahead_of_what_is_paid() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        job = buyer.router.run(spec(2000))
        async for event in job:
            if isinstance(event, JobTokens):
                break
        await until(lambda: seller.engine.emitted >= 2 * INCREMENT_TOKENS)
        for _ in range(50):
            await asyncio.sleep(0)
        assert seller.engine.emitted <= 2 * INCREMENT_TOKENS + 1
        await job.aclose()  # type: ignore[attr-defined]


async def test_caller_that_leaves_while_quotes_are_asked_leaves_no_stream_open() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        await buyer.router.card("twin-model")
        gate = asyncio.Event()

        async def hold(talk: Any) -> bytes:
            await gate.wait()
            raise StreamEnded("never")

        seller.provider.server._quote = hold  # type: ignore[method-assign]
        task = asyncio.create_task(run(buyer, spec(10)))
        await until(lambda: seller.provider.server._streams.total() == 1)
        task.cancel()
        gate.set()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: seller.provider.server._streams.total() == 0)


async def test_client_that_is_gone_before_acceptance_leaves_no_open_job() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        write = seller.store.write
        reached, gate = asyncio.Event(), asyncio.Event()

        async def slow(*records: Any) -> None:
            if type(records[0]).__name__ == "JobOpened":
                reached.set()
                await gate.wait()
            await write(*records)

        seller.store.write = slow  # type: ignore[method-assign]
        task = asyncio.create_task(run(buyer, spec(64)))
        await reached.wait()
        await market.network.kill(buyer.transport.peer_id)
        gate.set()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not seller.provider.server.running)
        assert await seller.store.jobs(Role.PROVIDER, open_only=True) == []
