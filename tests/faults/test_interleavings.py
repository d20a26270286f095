"""Moments in which one side stops between a journal write and what follows it; each of these once went wrong."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from incentives.ledger import ReceiptVouched, Record, Role, VoucherReceived
from incentives.settlement import SettlePolicy
from node.ports import JobFailed, JobTokens, StreamEnded
from node.provider.delivery import Delivery
from protocol.errors import RemoteProtocolError
from protocol.messages import JobRequest, WorkReceipt
from protocol.units import BPS, INCREMENT_TOKENS, FinishReason, Wei
from protocol.work import Work
from tests.spine.lab import Market, expected, run, spec
from tests.spine.test_endings import PROMPT_COST, TOKEN, buyer_learns, settle, stop_at, until
from tests.twins.engine_twin import EngineTwin
from tests.twins.memory_store import MemoryStore


class SlowStore(MemoryStore):
    """A disk that takes its time: a write that holds a `slow` record is kept, and returns when `gate` opens."""

    def __init__(self, slow: type) -> None:
        super().__init__()
        self.slow = slow
        self.gate = asyncio.Event()
        self.reached = asyncio.Event()

    async def write(self, *records: Record) -> None:
        await super().write(*records)
        if any(isinstance(record, self.slow) for record in records):
            self.reached.set()
            await self.gate.wait()


async def test_a_caller_who_leaves_while_a_voucher_is_journaled_can_still_use_the_channel() -> None:
    async with Market() as market:
        store = SlowStore(ReceiptVouched)
        seller, buyer = await market.seller(), await market.buyer(store=store)

        async def follow() -> None:
            async for _ in buyer.router.run(spec(500)):
                pass

        task = asyncio.create_task(follow())
        await store.reached.wait()
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, store.gate.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        await buyer.router.stop()
        assert [job.closed for job in await store.jobs(Role.CLIENT)] == [FinishReason.CANCELLED]
        _, done, _ = await run(buyer, spec(10))
        assert done.completion_tokens == 10
        (account,) = await store.accounts(Role.CLIENT)
        assert account.vouched == account.owed == buyer.accounts.spent
        assert account.owed == sum(job.owed for job in await store.jobs(Role.CLIENT))
        assert await settle(seller) == account.owed


async def test_a_provider_cut_off_while_it_journals_a_voucher_counts_it() -> None:
    async with Market() as market:
        store = SlowStore(VoucherReceived)
        seller, buyer = await market.seller(store=store), await market.buyer()
        task = asyncio.create_task(run(buyer, spec(500)))
        await store.reached.wait()
        asyncio.get_running_loop().call_later(0.05, store.gate.set)
        await seller.provider.server.drain(0.0)
        with pytest.raises(JobFailed):
            await task
        assert await settle(seller) == PROMPT_COST + INCREMENT_TOKENS * TOKEN
        (job,) = await store.jobs(Role.PROVIDER)
        assert job.owed == PROMPT_COST + INCREMENT_TOKENS * TOKEN


@pytest.mark.parametrize("restart", [False, True])
async def test_a_refund_whose_acknowledgement_was_lost_does_not_block_the_channel(
    monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    """The final receipt is below what was vouched for; whether or not its ack arrives, both sides must go on."""
    async with Market() as market:
        seller, buyer = await market.seller(standard_tpot_ms=2, standard_refund_bps=BPS // 2), await market.buyer()
        reached = stop_at(seller, 40)
        job = asyncio.create_task(run(buyer, spec(200, deadline_s=0.6)))
        await reached.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Delivery, "_on_ack", _lost)
            _, done, _ = await job
            await until(lambda: not seller.provider.server.running)
        metered = PROMPT_COST + 40 * TOKEN
        assert done.finish is FinishReason.DEADLINE and done.cost == metered - metered // 2
        seller.engine.pace = None
        if restart:
            await market.network.kill(seller.transport.peer_id)
            await seller.store.close()
            keys = seller.wallet, seller.node_key
            seller = await market.seller(
                store=seller.store, keys=keys, standard_tpot_ms=2, standard_refund_bps=BPS // 2
            )
            await buyer_learns(buyer, seller)
        _, again, _ = await run(buyer, spec(64))
        assert again.completion_tokens == 64
        assert await settle(seller) == buyer.accounts.spent == done.cost + again.cost


async def _lost(self: Delivery, frame: object) -> None:
    raise StreamEnded("the stream broke before the acknowledgement came")


async def test_a_successor_that_writes_another_text_is_not_paid_for_it() -> None:
    async with Market() as market:
        first = await market.seller()
        buyer = await market.buyer()
        second = await market.seller(engine=EngineTwin(), completion_price=2 * TOKEN)
        second.engine.lie = 3  # the fourth token after the acknowledged ones, which the first had already delivered
        await buyer_learns(buyer, second)
        reached = stop_at(first, 50)
        got: list[int] = []

        async def follow() -> None:
            async for event in buyer.router.run(spec(120)):
                if isinstance(event, JobTokens):
                    got.extend(event.token_ids)

        task = asyncio.create_task(follow())
        await reached.wait()
        await until(lambda: len(got) >= 40)
        await market.network.kill(first.transport.peer_id)
        with pytest.raises(JobFailed, match="another token"):
            await task
        await buyer.router.stop()
        assert await settle(second) == 0
        assert buyer.accounts.spent == PROMPT_COST + INCREMENT_TOKENS * TOKEN
        assert all(job.closed is not None for job in await buyer.store.jobs(Role.CLIENT))
        assert buyer.router.jobs_failed == 1


async def test_a_provider_starts_and_serves_while_the_chain_is_away_and_settles_when_it_is_back() -> None:
    async with Market() as market:
        policy = SettlePolicy(0, Wei(0), Wei(1))
        seller, buyer = await market.seller(policy=policy), await market.buyer()
        _, first, _ = await run(buyer, spec(64))
        await until(lambda: seller.provider.settler.totals.paid == first.cost)
        await market.network.kill(seller.transport.peer_id)
        await seller.provider.stop()
        await seller.store.close()
        seller.chain.down = True
        market.world.down = True
        again = await market.seller(store=seller.store, keys=(seller.wallet, seller.node_key), policy=policy)
        tokens, second, _ = await run(buyer, spec(40))
        (job, _) = await buyer.store.jobs(Role.CLIENT)
        assert tokens == expected(again.engine, job.accept.seed, spec(40))
        await until(lambda: bool(again.provider.settler.totals.last_error))
        assert (await again.provider.status())["last_settlement_error"]
        market.world.down = False
        await until(lambda: again.provider.settler.totals.paid == second.cost)


async def test_a_receipt_may_not_claim_a_voucher_that_was_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vouched` is the one field that the work account cannot recompute; the client's own channel can."""
    for lie in (lambda vouched: vouched + 1, lambda vouched: max(0, vouched - 1)):
        async with Market() as market:
            seller, buyer = await market.seller(), await market.buyer()

            class Liar(Work):
                def receipt(self, finish: FinishReason, at: int, vouched: Wei) -> tuple[Work, WorkReceipt]:
                    work, receipt = super().receipt(finish, at, vouched)
                    changed = lie(vouched) if self.step == 1 else vouched  # noqa: B023
                    return work, replace(receipt, vouched=Wei(changed))

                @classmethod
                def begin(cls, job: object, request: JobRequest, *rest: object) -> Work:
                    work = Work.start(job, request, *rest)  # type: ignore[arg-type]
                    return cls(**{name: getattr(work, name) for name in Work.__dataclass_fields__})

            monkeypatch.setattr("node.provider.server.Work", type("W", (), {"start": Liar.begin}))
            with pytest.raises((JobFailed, RemoteProtocolError), match="vouched"):
                await run(buyer, spec(200))
            assert buyer.accounts.spent == await settle(seller) == PROMPT_COST + INCREMENT_TOKENS * TOKEN
