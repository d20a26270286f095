"""What once stopped a provider for good, or made it pay for nothing: each stays mended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from incentives.ledger import ChannelKey, SettlementSent
from incentives.settlement import LEAVING_MARGIN_S, SettlePolicy
from node.chain.errors import ContractReverted
from node.ports import ChainError, ChainUnavailable, Mined, PreparedSettlement, Settled, StoreError
from node.provider.offering import LOG_ATTEMPTS
from protocol.eip712 import hash_struct
from protocol.messages import Tariff
from protocol.units import WEI_PER_TALLY, Digest, Wei
from tests.spine.lab import Buyer, Market, Seller, run, spec, until
from tests.twins.engine_twin import EngineTwin, profile
from tests.twins.memory_chain import MemoryChain
from tests.twins.memory_ledger import MemoryLedgerChain
from tests.twins.memory_store import MemoryStore

NEVER = SettlePolicy(10**9, Wei(1000 * WEI_PER_TALLY), Wei(1))
ALWAYS = SettlePolicy(0, Wei(0), Wei(1))
EPOCH_S = 60
LogTariff = Callable[[MemoryChain, Tariff, bytes], Awaitable[Mined]]


def market(epoch_s: int = EPOCH_S) -> Market:
    return Market(MemoryLedgerChain(epoch_seconds=epoch_s, timestamp=int(time.time()) - 5))


def sequences(signed: list[Tariff]) -> list[int]:
    return [tariff.sequence for tariff in signed]


def one_payload_per_sequence(signed: list[Tariff]) -> bool:
    slots = {(tariff.provider, tariff.profile_id, tariff.sequence): hash_struct(tariff) for tariff in signed}
    return set(slots.values()) == {hash_struct(tariff) for tariff in signed}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[Tariff]:
    """Every tariff that was signed and sent to the chain, refused ones included."""
    seen: list[Tariff] = []
    original = MemoryChain.log_tariff

    async def log(self: MemoryChain, tariff: Tariff, signature: bytes) -> Mined:
        seen.append(tariff)
        return await original(self, tariff, signature)

    monkeypatch.setattr(MemoryChain, "log_tariff", log)
    return seen


def before_log(monkeypatch: pytest.MonkeyPatch, act: Callable[[MemoryChain], None]) -> None:
    """`act` before each tariff reaches the chain."""
    original: LogTariff = MemoryChain.log_tariff

    async def log(self: MemoryChain, tariff: Tariff, signature: bytes) -> Mined:
        act(self)
        return await original(self, tariff, signature)

    monkeypatch.setattr(MemoryChain, "log_tariff", log)


async def leave(seller: Seller) -> None:
    await seller.provider.stop()
    await seller.transport.stop()
    await seller.store.close()


# ------------------------------------------------------------------------------------------------------------- tariffs


async def test_a_tariff_that_was_never_logged_does_not_lock_the_provider_out(
    logged: list[Tariff], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The RPC goes away after the tariff is on disk, and is back when its date is too near to be logged."""
    async with market() as lab:
        outage = [True]

        def fail(chain: MemoryChain) -> None:
            if outage.pop() if outage else False:
                lab.world.advance(10 * EPOCH_S)
                lab.clock.ahead_s += 10 * EPOCH_S
                raise ChainUnavailable("no answer")

        with monkeypatch.context() as patch:
            before_log(patch, fail)
            seller = await lab.seller()
        assert sequences(logged) == [2]
        assert seller.provider.offering.terms_in_force()
        assert len(seller.provider.offering.terms().tariffs) == 1


async def test_a_slow_block_costs_a_longer_notice_not_the_start(
    logged: list[Tariff], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with market() as lab:
        slow = [90, 90]
        with monkeypatch.context() as patch:
            before_log(patch, lambda _: lab.world.advance(slow.pop()) if slow else None)
            seller = await lab.seller()
        assert seller.provider.offering.terms_in_force()
        assert len(logged) > 1 and one_payload_per_sequence(logged)


async def test_a_tariff_that_the_chain_never_takes_is_said_and_never_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with market() as lab:
        tried = []

        def refuse(chain: MemoryChain) -> None:
            tried.append(chain)
            raise ContractReverted("logTariff", "NotRegistered", {})

        before_log(monkeypatch, refuse)
        with pytest.raises(ContractReverted, match="NotRegistered"):
            await lab.seller()
        assert len(tried) == 1  # its date was fine, so another date would not help


async def test_a_chain_that_is_ever_too_late_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with market() as lab:
        tried = []

        def late(chain: MemoryChain) -> None:
            tried.append(chain)
            lab.world.advance(100_000)

        before_log(monkeypatch, late)
        with pytest.raises(ContractReverted, match="TariffTooSoon"):
            await lab.seller()
        assert len(tried) == LOG_ATTEMPTS


async def test_a_provider_that_changes_its_model_and_back_signs_nothing_twice(logged: list[Tariff]) -> None:
    async with market() as lab:
        other = EngineTwin()
        other.profile = profile(b"another")
        first = await lab.seller()
        keys = first.wallet, first.node_key
        await leave(first)
        second = await lab.seller(store=first.store, keys=keys, engine=other)
        await leave(second)
        third = await lab.seller(store=first.store, keys=keys, completion_price=7)
        assert third.provider.offering.terms_in_force()
        assert sequences(logged) == [1, 1, 2] and one_payload_per_sequence(logged)
        await leave(third)
        await lab.seller(store=first.store, keys=keys, engine=other)
        assert len(logged) == 3  # the sheet of the other model is still good


async def test_a_new_home_of_an_old_wallet_goes_on_after_its_last_sequence(logged: list[Tariff]) -> None:
    async with market() as lab:
        first = await lab.seller()
        await leave(first)
        await lab.seller(store=MemoryStore(), keys=(first.wallet, first.node_key))
        assert sequences(logged) == [1, 2] and one_payload_per_sequence(logged)


# ---------------------------------------------------------------------------------------------------- background tasks


async def test_settling_goes_on_after_the_journal_failed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as lab:
        seller, buyer = await lab.seller(policy=ALWAYS), await lab.buyer()
        failures = [StoreError("the disk is full"), ChainError("HTTP 403")]
        original = MemoryStore.write

        async def write(self: MemoryStore, *records: object) -> None:
            if failures and any(isinstance(record, SettlementSent) for record in records):
                raise failures.pop(0)
            await original(self, *records)  # type: ignore[arg-type]

        monkeypatch.setattr(MemoryStore, "write", write)
        _, done, _ = await run(buyer, spec(64))
        await until(lambda: seller.provider.settler.totals.paid == done.cost)
        background = (await seller.provider.status())["background"]
        assert isinstance(background, dict)
        assert background["settling"]["failures"] == 1
        assert "the disk is full" in background["settling"]["last_error"]


async def test_following_the_chain_goes_on_after_a_refusal_and_a_failed_write(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [StoreError("the disk is full"), ChainError("HTTP 401")]
    original = MemoryChain.watch_slots

    async def watch(self: MemoryChain, *arguments: object) -> None:
        if failures:
            raise failures.pop(0)
        await original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(MemoryChain, "watch_slots", watch)
    async with Market() as lab:
        seller, buyer = await lab.seller(policy=NEVER), await lab.buyer()
        _, done, _ = await run(buyer, spec(64))
        await buyer.chain.request_exit(key(seller, buyer))
        await until(lambda: seller.provider.settler.totals.paid == done.cost)


async def test_a_task_that_a_bug_ends_is_in_the_log_and_in_the_status(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def watch(self: MemoryChain, *arguments: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(MemoryChain, "watch_slots", watch)
    async with Market() as lab:
        seller = await lab.seller()
        await until(lambda: "ended by a bug" in caplog.text)
        background = (await seller.provider.status())["background"]
        assert isinstance(background, dict)
        assert background["following the chain"]["state"] == "ended"
        assert background["settling"]["state"] == "running"
    assert any(record.exc_info for record in caplog.records)


async def test_an_offer_that_could_not_be_renewed_is_renewed_soon_after(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as lab:
        seller = await lab.seller()
        offering = seller.provider.offering
        renewed, failures = asyncio.Event(), [StoreError("the disk is full")]

        async def renew() -> None:
            if failures:
                raise failures.pop()
            renewed.set()

        monkeypatch.setattr(offering, "renew", renew)
        monkeypatch.setattr("node.provider.provider.OFFER_LIFE_S", 0.1)
        seller.provider._renew_at = 0.0
        task = seller.provider.background.start("again", seller.provider._keep_offering, "")
        await asyncio.wait_for(renewed.wait(), 5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# ---------------------------------------------------------------------------------------------------------- settlement


def key(seller: Seller, buyer: Buyer) -> ChannelKey:
    return ChannelKey(seller.wallet.address, buyer.accounts.session.address)


class Sends:
    """Counts settlements sent; fails them while `failure` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.failure: ChainError | None = None
        original = MemoryChain.send_settlement
        sends = self

        async def send(self: MemoryChain, prepared: PreparedSettlement) -> Settled:
            sends.count += 1
            if sends.failure is not None:
                raise sends.failure
            return await original(self, prepared)

        monkeypatch.setattr(MemoryChain, "send_settlement", send)


async def test_a_clean_stop_ends_when_a_payer_has_taken_its_deposit_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as lab:
        sends = Sends(monkeypatch)
        seller, buyer = await lab.seller(policy=NEVER), await lab.buyer()
        await run(buyer, spec(64))
        for task in seller.provider._tasks:  # its provider hears nothing of the exit
            task.cancel()
        await buyer.chain.request_exit(key(seller, buyer))
        lab.world.advance(4000)
        await buyer.chain.exit(key(seller, buyer))
        async with asyncio.timeout(5):
            await seller.provider.stop()
        assert sends.count == 1
        assert seller.provider.books.channel(buyer.accounts.session.address).deposit == 0


async def test_what_the_contract_skipped_is_not_sent_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when what it skipped still looks due: the RPC that answers may be behind."""
    async with Market() as lab:
        sends = Sends(monkeypatch)
        seller, buyer = await lab.seller(policy=NEVER), await lab.buyer()
        await run(buyer, spec(64))
        lab.world.reorg(lab.world.head.number - 5)  # the channel is gone, and nobody says so

        async def keep(client: object) -> None: ...

        monkeypatch.setattr(seller.provider.books, "refresh", keep)
        settler = seller.provider.settler
        settler._policy = ALWAYS
        for _ in range(5):
            await settler.settle_due()
        assert sends.count <= 1
        await settler.settle_rest()
        assert sends.count <= 2


async def test_a_send_that_fails_is_not_repeated_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as lab:
        sends = Sends(monkeypatch)
        sends.failure = ChainError("nonce trouble")
        seller, buyer = await lab.seller(policy=NEVER), await lab.buyer()
        _, done, _ = await run(buyer, spec(64))
        settler = seller.provider.settler
        settler._policy = ALWAYS
        for _ in range(20):
            await settler.settle_due()
        assert sends.count == 1
        assert settler.totals.last_error == "nonce trouble"
        lab.clock.ahead_s += 1.1
        await settler.settle_due()
        await settler.settle_due()
        assert sends.count == 2
        assert [row.state for row in await seller.store.settlements()] == ["dropped"]
        sends.failure = None
        lab.clock.ahead_s += 60
        settled = await settler.settle_due()
        assert settled is not None and settled.paid == done.cost
        assert settler.totals.last_error == ""


async def test_each_dropped_settlement_has_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as lab:
        seller = await lab.seller(policy=NEVER)
        names = [Digest(bytes([n]) * 32) for n in (1, 2)]
        for name in names:
            await seller.store.write(SettlementSent(name, seller.wallet.address, ()))
        dropped: dict[Digest, str] = {}
        original = seller.store.write

        async def write(*records: object) -> None:
            for record in records:
                dropped[record.transaction] = record.reason  # type: ignore[attr-defined]
            await original(*records)  # type: ignore[arg-type]

        async def result(transaction: Digest) -> Settled | None:
            if transaction == first:
                raise ChainError("it reverted")
            return None

        monkeypatch.setattr(seller.store, "write", write)
        first = (await seller.store.settlements(state="sent"))[0].transaction
        monkeypatch.setattr(seller.chain, "settlement_result", result)
        await seller.provider.settler.resolve("lost in a restart")
        assert dropped.pop(first) == "it reverted"
        assert list(dropped.values()) == ["lost in a restart"]


async def test_a_leaving_payer_s_dust_waits_until_its_exit_is_near() -> None:
    async with Market() as lab:
        seller = await lab.seller(policy=SettlePolicy(0, Wei(1), Wei(WEI_PER_TALLY)))
        buyer = await lab.buyer()
        _, done, _ = await run(buyer, spec(10))
        await buyer.chain.request_exit(key(seller, buyer))
        client = buyer.accounts.session.address
        await until(lambda: seller.provider.books.channel(client).exit_at > 0)
        assert await seller.provider.settler.settle_due() is None
        exit_at = seller.provider.books.channel(client).exit_at
        lab.clock.ahead_s += exit_at - LEAVING_MARGIN_S - lab.clock.now_ms() // 1000 + 1
        seller.provider.settler.wake()
        await until(lambda: seller.provider.settler.totals.paid == done.cost)
