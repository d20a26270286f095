"""The client's channels under concurrency: its cap, its deposits and its vouchers, whatever happens in between."""

from __future__ import annotations

import asyncio
from dataclasses import fields

import pytest

from incentives.ledger import ReceiptVouched, Record, Role
from node.chain.errors import OutOfCoin
from node.client.accounts import Accounts, SpendingLimits
from node.ports import ChainUnavailable, ChannelAccount, InsufficientFunds, Mined, StoreError
from protocol.errors import Overspend
from protocol.messages import Voucher, WorkReceipt
from protocol.signing import Signer
from protocol.units import ZERO_DIGEST, Address, JobId, Wei
from tests.spine.lab import Market, run, spec, until, wallet
from tests.twins.memory_chain import MemoryChain
from tests.twins.memory_ledger import MemoryLedgerChain

A, B = Address(b"\xaa" * 20), Address(b"\xbb" * 20)


def job(number: int) -> JobId:
    return JobId(number.to_bytes(32, "big"))


class Journal:
    """As much of a store as Accounts uses. `gate`: writes of receipts wait for it, then they are kept."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = 0
        self.full = False

    async def write(self, *records: Record) -> None:
        if any(isinstance(record, ReceiptVouched) for record in records):
            self.waiting += 1
            await self.gate.wait()
        if self.full:
            raise StoreError("the disk is full")
        self.records += records

    async def accounts(self, role: Role) -> list[ChannelAccount]:
        return []

    @property
    def vouchers(self) -> list[Voucher]:
        return [record.voucher for record in self.records if isinstance(record, ReceiptVouched)]


class Purse:
    """Accounts over a journal and a chain in memory. The wallet holds 10,000 wei, and a deposit is 1,000."""

    def __init__(self, total: int = 0, deposit: int = 1000, tally: int = 10_000) -> None:
        self.owner = wallet()
        self.world = MemoryLedgerChain(epoch_seconds=0, timestamp=1_700_000_000)
        self.world.fund(self.owner.address, tally, 10**18)
        self.chain = CountingChain(self.world, self.owner)
        self.journal = Journal()
        limits = SpendingLimits(Wei(deposit), Wei(total))
        self.accounts = Accounts(wallet(), self.owner.address, limits, self.journal, self.chain)  # type: ignore[arg-type]

    async def vouch(self, provider: Address, job_id: JobId, before: int, after: int) -> None:
        values = dict.fromkeys((item.name for item in fields(WorkReceipt)), 0) | {"total": after}
        receipt = WorkReceipt(**values)  # type: ignore[arg-type]
        await self.accounts.vouch(provider, job_id, Wei(before), receipt, ZERO_DIGEST, b"", ())

    def reserved(self, provider: Address) -> dict[JobId, Wei]:
        return dict(self.accounts.channel(provider).reserved)


class CountingChain(MemoryChain):
    """`deposits`: how often one was asked for. `failure`: what asking raises; `late`: only once it was mined."""

    def __init__(self, world: MemoryLedgerChain, owner: Signer) -> None:
        super().__init__(world, owner)
        self.deposits: list[int] = []
        self.failure: Exception | None = None
        self.late = False

    async def open_channel(self, provider: Address, session_secret: bytes, amount: Wei) -> Mined:
        self.deposits.append(amount)
        if self.failure is not None and not self.late:
            raise self.failure
        mined = await super().open_channel(provider, session_secret, amount)
        if self.failure is not None:
            raise self.failure
        return mined


# --------------------------------------------------------------------------------------------------------- the cap


async def test_running_jobs_count_against_the_cap() -> None:
    purse = Purse(total=250)
    await purse.accounts.ensure(A, job(1), Wei(10), Wei(100))
    await purse.accounts.ensure(B, job(2), Wei(10), Wei(100))
    await purse.accounts.ensure(B, job(3), Wei(10), Wei(100))
    assert purse.reserved(B) == {job(2): 100, job(3): 50}
    with pytest.raises(InsufficientFunds, match="cap"):
        await purse.accounts.ensure(A, job(4), Wei(1), Wei(1))
    purse.accounts.release(B, job(2))
    await purse.accounts.ensure(A, job(4), Wei(10), Wei(200))
    assert purse.reserved(A) == {job(1): 100, job(4): 100}


async def test_jobs_that_start_at_the_same_moment_stay_within_the_cap() -> None:
    purse = Purse(total=100)
    jobs = (purse.accounts.ensure(provider, job(i), Wei(40), Wei(60)) for i, provider in enumerate((A, B, A, B)))
    outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    assert sum(outcome is None for outcome in outcomes) == 2
    assert sum([*purse.reserved(A).values(), *purse.reserved(B).values()]) == 100


async def test_a_voucher_above_the_cap_is_refused_and_nothing_is_promised() -> None:
    purse = Purse(total=150, deposit=1000)
    await purse.accounts.ensure(A, job(1), Wei(10), Wei(100))
    await purse.accounts.ensure(B, job(2), Wei(10), Wei(50))
    await purse.vouch(A, job(1), 0, 100)
    with pytest.raises(InsufficientFunds, match="cap"):
        await purse.vouch(A, job(1), 100, 101)  # the rest is promised to the other job
    await purse.vouch(B, job(2), 0, 50)
    assert [voucher.cumulative for voucher in purse.journal.vouchers] == [100, 50]
    assert purse.accounts.spent == 150


async def test_vouchers_journaled_at_the_same_time_stay_within_the_cap() -> None:
    purse = Purse(total=120)
    await purse.accounts.ensure(A, job(1), Wei(10), Wei(50))
    await purse.accounts.ensure(B, job(2), Wei(10), Wei(50))
    purse.journal.gate.clear()
    both = asyncio.gather(purse.vouch(A, job(1), 0, 65), purse.vouch(B, job(2), 0, 65), return_exceptions=True)
    await until(lambda: purse.journal.waiting > 0)
    purse.journal.gate.set()
    outcomes = await both
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["InsufficientFunds", "NoneType"]
    assert purse.accounts.spent == 65


async def test_credit_may_be_used_up_at_the_cap() -> None:
    purse = Purse(total=100)
    await purse.accounts.ensure(A, job(1), Wei(10), Wei(100))
    await purse.vouch(A, job(1), 0, 100)
    await purse.vouch(A, job(1), 100, 60)  # a refund
    purse.accounts.release(A, job(1))
    await purse.accounts.ensure(A, job(2), Wei(40), Wei(100))
    await purse.vouch(A, job(2), 0, 40)
    assert purse.accounts.spent == 100
    with pytest.raises(Overspend):  # escrow was never more than the cap
        await purse.vouch(A, job(2), 40, 41)


async def test_no_more_is_put_into_escrow_than_the_cap_lets_be_spent() -> None:
    """A provider serves up to the escrow it sees; past our cap it would serve for nothing."""
    purse = Purse(total=300, deposit=1000)
    await purse.accounts.ensure(A, job(1), Wei(10), Wei(5000))
    assert purse.accounts.channel(A).deposit == 300
    with pytest.raises(InsufficientFunds, match="cap"):
        await purse.accounts.ensure(B, job(2), Wei(10), Wei(100))
    assert purse.chain.deposits == [300]


async def test_a_job_that_reaches_the_cap_ends_paid_for() -> None:
    async with Market() as market:
        seller = await market.seller()
        cap = 4 * 10**10 + 70 * 10**11
        buyer = await market.buyer(total=cap)
        with pytest.raises(InsufficientFunds):
            await run(buyer, spec(2000))
        assert 0 < buyer.accounts.spent <= cap
        await until(lambda: not seller.provider.server.running)
        settled = await seller.provider.settler.settle_due(everything=True)
        assert settled is not None and settled.paid == buyer.accounts.spent


# --------------------------------------------------------------------------------------------------------- funding


async def test_a_voucher_does_not_wait_for_a_deposit() -> None:
    purse = Purse(deposit=100)
    await purse.accounts.ensure(A, job(1), Wei(10), Wei(100))
    purse.world.automine = False
    second = asyncio.create_task(purse.accounts.ensure(A, job(2), Wei(10), Wei(100)))
    await until(lambda: len(purse.chain.deposits) == 2)
    async with asyncio.timeout(1):
        await purse.vouch(A, job(1), 0, 40)
    purse.world.mine()
    await second
    assert purse.accounts.spent == 40 and purse.reserved(A) == {job(1): 60, job(2): 100}


async def test_jobs_that_start_together_share_one_deposit() -> None:
    purse = Purse(deposit=1000)
    await asyncio.gather(*(purse.accounts.ensure(A, job(i), Wei(10), Wei(100)) for i in range(8)))
    assert purse.chain.deposits == [1000]
    assert len(purse.reserved(A)) == 8


async def test_a_caller_that_leaves_does_not_cause_a_second_deposit() -> None:
    purse = Purse(deposit=1000)
    purse.world.automine = False
    first = asyncio.create_task(purse.accounts.ensure(A, job(1), Wei(10), Wei(100)))
    await until(lambda: purse.chain.deposits != [])
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(purse.accounts.ensure(A, job(2), Wei(10), Wei(100)))
    await asyncio.sleep(0.01)
    purse.world.mine()
    await second
    assert purse.chain.deposits == [1000]
    assert purse.accounts.channel(A).deposit == 1000 and purse.reserved(A) == {job(2): 100}


async def test_a_deposit_that_was_mined_though_the_answer_was_lost_is_not_made_again() -> None:
    purse = Purse(deposit=1000)
    purse.chain.failure, purse.chain.late = ChainUnavailable("no answer"), True
    await purse.accounts.ensure(A, job(1), Wei(10), Wei(100))
    await purse.accounts.ensure(A, job(2), Wei(10), Wei(100))
    assert purse.chain.deposits == [1000]


@pytest.mark.parametrize("failure", [OutOfCoin(A), ChainUnavailable("no answer")])
async def test_wallet_trouble_does_not_stop_a_job_that_escrow_covers(failure: Exception) -> None:
    purse = Purse(deposit=100)
    await purse.accounts.ensure(A, job(1), Wei(10), Wei(60))
    purse.chain.failure = failure
    await purse.accounts.ensure(A, job(2), Wei(10), Wei(500))
    assert purse.reserved(A) == {job(1): 60, job(2): 40}
    with pytest.raises(InsufficientFunds, match="0 wei free") as caught:
        await purse.accounts.ensure(A, job(3), Wei(10), Wei(500))
    assert caught.value.__cause__ is failure


# ------------------------------------------------------------------------------------------------------- promising


async def test_a_job_released_while_its_voucher_is_written_stays_released() -> None:
    purse = Purse(deposit=1000)
    await purse.accounts.ensure(A, job(1), Wei(10), Wei(100))
    purse.journal.gate.clear()
    promise = asyncio.create_task(purse.vouch(A, job(1), 0, 40))
    await until(lambda: purse.journal.waiting > 0)
    purse.accounts.release(A, job(1))
    await purse.accounts.ensure(A, job(2), Wei(10), Wei(100))
    purse.journal.gate.set()
    await promise
    assert purse.reserved(A) == {job(2): 100} and purse.accounts.spent == 40


async def test_memory_does_not_fall_behind_the_journal_when_the_caller_leaves() -> None:
    purse = Purse(deposit=1000)
    await purse.accounts.ensure(A, job(1), Wei(10), Wei(100))
    purse.journal.gate.clear()
    promise = asyncio.create_task(purse.vouch(A, job(1), 0, 40))
    await until(lambda: purse.journal.waiting > 0)
    promise.cancel()
    await asyncio.sleep(0.01)
    purse.journal.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await promise
    assert [voucher.cumulative for voucher in purse.journal.vouchers] == [40]
    assert purse.accounts.spent == 40


async def test_what_could_not_be_journaled_was_not_promised() -> None:
    purse = Purse(total=100, deposit=1000)
    await purse.accounts.ensure(A, job(1), Wei(10), Wei(100))
    purse.journal.full = True
    with pytest.raises(StoreError):
        await purse.vouch(A, job(1), 0, 100)
    purse.journal.full = False
    assert purse.accounts.spent == 0
    await purse.vouch(A, job(1), 0, 100)
    assert purse.accounts.channel(A).vouched == 100
