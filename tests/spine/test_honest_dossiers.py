"""An honest provider is never condemned: whatever happens to a job, its papers stand an audit and prove no fault.

Leaving each market examines every job of every seller (tests/spine/lab.py), as it does in all spine tests. Here are the
ways a job can go that no other test takes it, and the machine's own troubles: clocks, crashes, keys, sheets that end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

import pytest

from incentives.fairness import entry_of
from incentives.ledger import ReceiptIssued, Role
from node.jobstream import JobStream
from node.ports import InsufficientFunds, JobFailed, JobSpec, JobTokens, NoProvider, UnfitRequest
from node.provider import delivery as delivery_module
from node.provider.delivery import Delivery
from protocol.dossier import Forged
from protocol.errors import Refused
from protocol.frames import Receipt, VoucherFrame
from protocol.messages import WorkReceipt
from protocol.options import JobOptions
from protocol.units import BPS, INCREMENT_TOKENS, FinishReason, JobKind, Tier
from tests.spine.dossiers import examine_all, faults_of
from tests.spine.lab import Market, Seller, idle, run, spec, until, wallet
from tests.spine.test_endings import PROMPT_COST, TOKEN, stop_at
from tests.spine.test_metering import texts
from tests.twins.engine_twin import EngineTwin


async def receipts(seller: Seller) -> list[WorkReceipt]:
    rows = await seller.store.receipts(role=Role.PROVIDER, limit=1000)
    return [row.receipt for row in rows]


async def finals(seller: Seller) -> list[FinishReason]:
    return [FinishReason(receipt.finish_reason) for receipt in await receipts(seller) if receipt.is_final]


async def gone(seller: Seller, job: Awaitable[object]) -> None:
    """Runs a job that need not end well."""
    try:
        await job
    except (InsufficientFunds, JobFailed, NoProvider, Refused):
        pass
    await idle(seller)


# ------------------------------------------------------------------------------------------------- how jobs may end


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 96])
async def test_every_length_around_an_increment(length: int) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        await run(buyer, spec(length))
        await idle(seller)
        assert await finals(seller) == [FinishReason.LENGTH]


@pytest.mark.parametrize("at", [0, 1, 31, 32, 33, 63, 64])
async def test_a_stop_token_at_every_place_around_an_increment(at: int) -> None:
    async with Market() as market:
        seller = await market.seller()
        seller.engine.token = lambda seed, position: 9 if position - 4 == at else 50  # type: ignore[method-assign]
        buyer = await market.buyer()
        tokens, _, _ = await run(buyer, spec(65, options=JobOptions(stop_ids=(9,))))
        await idle(seller)
        assert len(tokens) == at + 1 and await finals(seller) == [FinishReason.STOP]


@pytest.mark.parametrize("at", [0, 1, 31, 32, 33, 64])
async def test_a_cancel_at_every_place_around_an_increment(at: int) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        reached = stop_at(seller, at)
        got = asyncio.Event()

        async def follow() -> None:
            seen = 0
            async for event in buyer.router.run(spec(200)):
                seen += len(event.token_ids) if isinstance(event, JobTokens) else 0
                if seen >= at:
                    got.set()

        task = asyncio.create_task(follow())
        await reached.wait()
        if at:
            await got.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await idle(seller)
        assert all(finish is FinishReason.CANCELLED for finish in await finals(seller))


@pytest.mark.parametrize("at", [0, 5, 32, 40])
async def test_a_deadline_before_the_first_token_and_within_a_leaf(at: int) -> None:
    async with Market() as market:
        seller = await market.seller(standard_ttft_ms=10, standard_tpot_ms=1, standard_refund_bps=BPS)
        buyer = await market.buyer()
        stop_at(seller, at)
        await gone(seller, run(buyer, spec(200, deadline_s=0.4)))
        assert await finals(seller) == [FinishReason.DEADLINE]


async def test_an_escrow_that_runs_dry_and_jobs_of_one_text_and_many() -> None:
    async with Market() as market:
        seller = await market.seller()
        purse = PROMPT_COST + 80 * TOKEN
        buyer = await market.buyer(tally=purse, deposit=purse)
        await gone(seller, run(buyer, spec(500)))
        assert await finals(seller) == [FinishReason.ESCROW_EXHAUSTED]
        rich = await market.buyer()
        await run(rich, texts(7))
        await run(rich, texts(4, 30, 1, dimensions=5))


async def test_embeddings_that_are_cancelled_or_late_before_the_first_vector() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(embedding_price=7), await market.buyer()
        hold = asyncio.Event()
        embed = seller.engine.embed

        async def slow(*args: Any) -> Any:
            await hold.wait()
            return await embed(*args)

        seller.engine.embed = slow  # type: ignore[method-assign, assignment]
        await gone(seller, run(buyer, replace(texts(4, 5), deadline_s=0.3)))
        assert await finals(seller) == [FinishReason.DEADLINE]
        task = asyncio.create_task(run(buyer, texts(4, 5)))
        await until(lambda: seller.provider.server.running == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await idle(seller)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("kind", [JobKind.GENERATE, JobKind.BATCH, JobKind.EMBED])
@pytest.mark.parametrize("tier", list(Tier))
async def test_every_kind_and_tier_open_and_private_at_prices_that_are_not_round(
    kind: JobKind, tier: Tier, private: bool
) -> None:
    if kind is JobKind.BATCH:
        tier = Tier.FLEX
    async with Market() as market:
        seller = await market.seller(
            prompt_price=10**10 + 7,
            completion_price=10**11 + 3,
            flex_bps=3_333,
            standard_bps=9_999,
            priority_bps=23_457,
            long_context_threshold=50,
            long_context_bps=15_001,
            privacy_bps=12_347,
            base_min_bps=7_001,
            base_max_bps=20_003,
            per_request=11,
            embedding_price=13,
            standard_ttft_ms=1,
            standard_refund_bps=3_331,
        )
        buyer = await market.buyer()
        for length in (4, 50, 51, 100):
            prompt = tuple(range(3, 3 + length))
            if kind is JobKind.EMBED:
                options = JobOptions(inputs=(1, length - 1))
                await run(buyer, spec(0, prompt, kind=kind, tier=tier, private=private, options=options))
            else:
                await run(buyer, spec(40, prompt, kind=kind, tier=tier, private=private))
        await idle(seller)
        assert len(await finals(seller)) == 4


async def test_a_kept_promise_of_the_cache_survives_a_restart_without_the_cache() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(cache_ttl_s=600), await market.buyer()
        prompt = tuple(range(10, 110))
        await run(buyer, spec(40, prompt))
        await run(buyer, spec(70, (*prompt, 7, 8)))
        await idle(seller)
        await seller.provider.stop()
        await seller.transport.stop()
        await seller.store.close()
        again = await market.seller(store=seller.store, keys=(seller.wallet, seller.node_key), cache_ttl_s=600)
        await buyer.router._directory.refresh()
        _, done, _ = await run(buyer, spec(40, (*prompt, 9)))
        assert done.cached_tokens == 96 and again.engine.hit == 0
        await idle(again)


async def test_an_engine_that_fails_and_a_request_that_turns_out_unfit() -> None:
    class Breaks(EngineTwin):
        error: Exception = RuntimeError("a kernel failed")

        async def _generate(self, request: Any) -> Any:
            async for token in super()._generate(request):
                if self.emitted % 41 == 40:
                    raise self.error
                yield token

    for error in (RuntimeError("a kernel failed"), UnfitRequest("a grammar that leads nowhere")):
        async with Market() as market:
            engine = Breaks()
            engine.error = error
            seller, buyer = await market.seller(engine=engine), await market.buyer()
            await gone(seller, run(buyer, spec(100)))
            assert [r.step for r in await receipts(seller)] == [1]


# ---------------------------------------------------------------------------------------------- who hears what, or not


async def lose(monkeypatch: pytest.MonkeyPatch, kind: type, count: int) -> None:
    """The `count`-th frame of a kind is never sent, and its stream is cut there."""
    send, seen = JobStream.send, [0]

    async def cut(self: JobStream, *outgoing: Any) -> None:
        if any(isinstance(frame, kind) for frame in outgoing):
            seen[0] += 1
            if seen[0] == count:
                await self.stream.reset()
                return
        await send(self, *outgoing)

    monkeypatch.setattr(JobStream, "send", cut)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("frame", [Receipt, VoucherFrame])
async def test_a_receipt_or_its_voucher_lost_on_the_way(
    frame: type, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is committed at its last vouched receipt, or at its first when none was."""
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        await lose(monkeypatch, frame, count)
        await gone(seller, run(buyer, spec(100)))
        (job,) = await seller.store.jobs(Role.PROVIDER)
        rows = await seller.store.receipts(role=Role.PROVIDER, job_id=job.job_id)
        entry = entry_of((row.digest, row.receipt, row.voucher is not None) for row in rows)
        assert entry is not None
        steps = {row.digest: row.receipt.step for row in rows}
        assert (len(rows), steps[entry.receipt]) == (count, max(1, count - 1))
        assert entry.amount == PROMPT_COST + INCREMENT_TOKENS * TOKEN


async def test_a_final_receipt_that_nobody_acknowledges(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        monkeypatch.setattr(delivery_module, "ACK_TIMEOUT_S", 0.1)

        async def deaf(self: Delivery, frame: object) -> None:
            return

        monkeypatch.setattr(Delivery, "_on_ack", deaf)
        await gone(seller, run(buyer, spec(70)))
        assert len(await receipts(seller)) == 3


async def test_a_total_that_falls_with_a_refund_at_the_end_breaks_no_chain() -> None:
    async with Market() as market:
        seller = await market.seller(standard_tpot_ms=1, standard_refund_bps=9_000)
        buyer = await market.buyer()

        async def pace(at: int) -> None:
            if at >= 64:
                await asyncio.sleep(0.05)

        seller.engine.pace = pace
        await run(buyer, spec(70))
        await idle(seller)
        totals = [receipt.total for receipt in sorted(await receipts(seller), key=lambda receipt: receipt.step)]
        assert totals[-1] < totals[-2] and totals[0] < totals[1]


# -------------------------------------------------------------------------------------------------- clocks and sheets


@pytest.mark.parametrize("at", [0, 20, 32, 50])
@pytest.mark.parametrize("seconds", [-7_200.0, -2.0, 2.0, 7_200.0])
async def test_a_clock_that_is_set_while_a_job_runs(at: int, seconds: float) -> None:
    """No receipt states a first token before its job, or an end before its first token."""
    async with Market() as market:
        seller = await market.seller(standard_ttft_ms=60_000, standard_tpot_ms=10_000, standard_refund_bps=BPS)
        buyer = await market.buyer()

        async def pace(index: int) -> None:
            if index == at:
                market.clock.wrong_s = seconds

        seller.engine.pace = pace
        await gone(seller, run(buyer, spec(70)))
        assert await receipts(seller)
        assert all(receipt.refund == 0 for receipt in await receipts(seller)), "no promise was missed"


@pytest.mark.parametrize("job", [spec(200, deadline_s=0.4), replace(texts(4, 5), deadline_s=0.4)])
async def test_a_clock_set_back_at_the_deadline(job: JobSpec) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        reached = stop_at(seller, 40)

        async def never(*args: Any) -> Any:
            reached.set()
            await asyncio.Event().wait()

        seller.engine.embed = never  # type: ignore[method-assign, assignment]
        task = asyncio.create_task(gone(seller, run(buyer, job)))
        await reached.wait()
        market.clock.wrong_s = -600.0
        await task
        assert await finals(seller) == [FinishReason.DEADLINE]


async def test_a_sheet_that_ends_while_the_request_is_read_is_not_served_under() -> None:
    """Accepted after its end, every receipt of the job would prove a fault."""
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        (tariff,) = seller.provider.offering.terms().tariffs.values()
        submit = seller.engine.submit

        async def late(request: Any) -> Any:
            market.clock.wrong_s = tariff.valid_until - market.clock.now_ms() / 1000 + 1
            return await submit(request)

        seller.engine.submit = late  # type: ignore[method-assign]
        await gone(seller, run(buyer, spec(40)))
        assert await seller.store.jobs(Role.PROVIDER) == []


async def test_a_sheet_that_ends_while_its_job_runs_stands_to_the_end_of_it() -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        (tariff,) = seller.provider.offering.terms().tariffs.values()

        async def pace(index: int) -> None:
            if index == 10:
                market.clock.wrong_s = tariff.valid_until - market.clock.now_ms() / 1000 + 1

        seller.engine.pace = pace
        await gone(seller, run(buyer, spec(70)))
        assert await receipts(seller)


# ---------------------------------------------------------------------------------------------------- crashes and keys


async def test_a_node_key_changed_between_job_and_audit() -> None:
    """What was accepted under the former key is shown under the present one."""
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        await run(buyer, spec(70))
        await idle(seller)
        renewed, former = wallet(), seller.node_key.address
        shown = await examine_all(seller.store, seller.chain, seller.wallet.address, renewed, (former,))
        assert len(shown) == 1 and shown[0].dossier.receipt.is_final
        with pytest.raises(Forged, match="no key of the provider"):
            await examine_all(seller.store, seller.chain, seller.wallet.address, renewed)


@pytest.mark.parametrize("step", [1, 2, 3])
async def test_a_crash_with_a_receipt_on_disk_and_no_signature_given(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipt is signed at its audit for the first time; no other is ever signed for its step."""
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        write = seller.store.write

        async def dies(*records: Any) -> None:
            await write(*records)
            if any(isinstance(item, ReceiptIssued) and item.receipt.step == step for item in records):
                raise asyncio.CancelledError

        monkeypatch.setattr(seller.store, "write", dies)
        await gone(seller, asyncio.wait_for(_any(run(buyer, spec(70))), 10))
        monkeypatch.setattr(seller.store, "write", write)
        await seller.provider.stop()
        await seller.transport.stop()
        await seller.store.close()
        again = await market.seller(store=seller.store, keys=(seller.wallet, seller.node_key))
        assert max(receipt.step for receipt in await receipts(again)) == step
        assert not await faults_of(again.store, again.chain)


async def _any(job: Awaitable[object]) -> None:
    try:
        await job
    except Exception:  # noqa: BLE001 - how the client hears of it is not what is tested
        return
