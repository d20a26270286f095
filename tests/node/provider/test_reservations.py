"""Rights as a provider honours them: the right key, the right time, the right rate, on the chain's word."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from node.ports import CapacityTerms, ReservationOrder
from node.provider.reservations import DENIED_MS, MAX_DENIED, MEMORY_MS, Reservations
from protocol.errors import Refused
from protocol.frames import RefusalCode
from protocol.signing import Signer
from protocol.units import ZERO_DIGEST, Address, Digest, Wei
from tests.node.chain.helpers import session
from tests.twins.chain_lab import LAB_OPTIONS, MemoryLab
from tests.twins.memory_chain import MemoryChain

PROFILE = Digest(b"\x07" * 32)
PERIOD = LAB_OPTIONS.period_seconds
RATE = 1_000_000
BUCKET = 60 * RATE
KEY, OTHER_KEY = session(1).address, session(2).address


class Sold:
    """A provider, a holder, and one right of `RATE` for ten periods."""

    async def open(self, lab: MemoryLab) -> Sold:
        self.lab = lab
        self.seller_wallet, self.holder_wallet = await lab.account(), await lab.account()
        self.seller, self.holder = await self.node(self.seller_wallet), await self.node(self.holder_wallet)
        for profile in (PROFILE, ZERO_DIGEST):
            await self.seller.offer_capacity(profile, CapacityTerms(10 * RATE, Wei(1), 1, 100))
        first = (await self.seller.head()).timestamp // PERIOD + 1
        self.right = await self.bought(first)
        self.start_ms = first * PERIOD * 1000
        self.reads = 0
        self.rights = Reservations(self.seller_wallet.address, PROFILE, self.seller)
        return self

    async def node(self, wallet: Signer) -> MemoryChain:
        node = await self.lab.node(wallet)
        assert isinstance(node, MemoryChain)
        return node

    async def bought(self, first: int, profile: Digest = PROFILE, provider: Address | None = None) -> Digest:
        seller = provider or self.seller_wallet.address
        right, _ = await self.holder.buy_reservation(
            ReservationOrder(seller, profile, RATE, first, 10, KEY, Wei(10**12))
        )
        return right

    async def refusal(self, right: Digest, client: Address, ste_micro: int, now_ms: int) -> tuple[str, str]:
        with pytest.raises(Refused) as refused:
            await self.rights.check(right, client, ste_micro, now_ms)
        return refused.value.code, refused.value.reason


@pytest.fixture
async def sold() -> AsyncIterator[Sold]:
    yield await Sold().open(MemoryLab())


async def test_jobs_under_a_right_run_at_its_rate(sold: Sold) -> None:
    now = sold.start_ms
    await sold.rights.check(sold.right, KEY, BUCKET, now)
    code, reason = await sold.refusal(sold.right, KEY, 2 * RATE, now)
    assert code == RefusalCode.BUSY and "fits again in 2000 ms" in reason
    await sold.rights.check(sold.right, KEY, 2 * RATE, now + 2_000)
    sold.rights.give_back(sold.right, RATE, now + 2_000)
    await sold.rights.check(sold.right, KEY, RATE, now + 2_000)


async def test_a_right_serves_only_the_key_it_is_assigned_to(sold: Sold) -> None:
    code, reason = await sold.refusal(sold.right, OTHER_KEY, 1, sold.start_ms)
    assert code == RefusalCode.BAD_REQUEST and "not assigned to this session key" in reason


async def test_a_right_serves_only_in_its_time(sold: Sold) -> None:
    for now in (sold.start_ms - 1, sold.start_ms + 10 * PERIOD * 1000):
        code, reason = await sold.refusal(sold.right, KEY, 1, now)
        assert code == RefusalCode.BAD_REQUEST and "the reservation runs from" in reason
    await sold.rights.check(sold.right, KEY, 1, sold.start_ms + 10 * PERIOD * 1000 - 1)


async def test_a_right_is_for_one_provider_and_profile(sold: Sold) -> None:
    first = sold.start_ms // 1000 // PERIOD
    await sold.holder.offer_capacity(PROFILE, CapacityTerms(RATE, Wei(1), 1, 10))
    for right in (
        ZERO_DIGEST,
        await sold.bought(first, profile=ZERO_DIGEST),
        await sold.bought(first, provider=sold.holder_wallet.address),
    ):
        code, reason = await sold.refusal(right, KEY, 1, sold.start_ms)
        assert code == RefusalCode.BAD_REQUEST and "no such reservation" in reason


async def test_a_transfer_is_seen_after_the_memory_and_use_is_not_forgotten(sold: Sold) -> None:
    now = sold.start_ms
    await sold.rights.check(sold.right, KEY, BUCKET, now)
    await sold.holder.transfer_reservation(sold.right, sold.seller_wallet.address)
    await sold.seller.assign_reservation(sold.right, OTHER_KEY)
    await sold.rights.check(sold.right, KEY, RATE, now + 1_000)
    now += MEMORY_MS
    assert (await sold.refusal(sold.right, KEY, 1, now))[0] == RefusalCode.BAD_REQUEST
    left = (MEMORY_MS // 1000 - 1) * RATE
    code, _ = await sold.refusal(sold.right, OTHER_KEY, left + 1, now)
    assert code == RefusalCode.BUSY, "the new holder takes over the bucket as it is"
    await sold.rights.check(sold.right, OTHER_KEY, left, now)


async def test_a_right_that_was_quit_ends(sold: Sold) -> None:
    now = sold.start_ms
    await sold.rights.check(sold.right, KEY, 1, now)
    await sold.holder.quit_reservation(sold.right)
    await sold.refusal(sold.right, KEY, 1, now + 5 * PERIOD * 1000)


async def test_while_the_chain_is_away_what_was_confirmed_holds(sold: Sold) -> None:
    now = sold.start_ms
    await sold.rights.check(sold.right, KEY, 1, now)
    sold.seller.down = True
    await sold.rights.check(sold.right, KEY, 1, now + 2 * MEMORY_MS)
    code, reason = await sold.refusal(Digest(b"\x01" * 32), KEY, 1, now)
    assert code == RefusalCode.BUSY and "cannot be looked up" in reason
    sold.seller.down = False


async def test_made_up_ids_cost_one_read_and_bounded_memory(sold: Sold, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, look = [], sold.seller.reservation

    async def counted(right: Digest) -> object:
        reads.append(right)
        return await look(right)

    monkeypatch.setattr(sold.seller, "reservation", counted)
    now = sold.start_ms
    await sold.rights.check(sold.right, KEY, BUCKET, now)
    for _ in range(3):
        await sold.refusal(ZERO_DIGEST, KEY, 1, now)
    assert reads == [sold.right, ZERO_DIGEST]
    await sold.refusal(ZERO_DIGEST, KEY, 1, now + DENIED_MS)
    assert len(reads) == 3
    for number in range(MAX_DENIED + 10):
        await sold.refusal(Digest(number.to_bytes(32, "big")), KEY, 1, now)
    assert len(sold.rights._denied) == MAX_DENIED
    assert (await sold.refusal(sold.right, KEY, 1, now))[0] == RefusalCode.BUSY, "a flood fills no bucket"
