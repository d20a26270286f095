"""The provider's base multiplier: utilisation is measured right, epochs roll once, and a crash changes no epoch."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.ports import StoreError
from node.provider.base import BasePrice, Step, Utilisation
from protocol.base_price import BASE_EPOCH_S, check_base, contradicts, next_base
from protocol.messages import Offer, Tariff
from protocol.units import BPS
from tests.protocol.sheets import SHEET
from tests.protocol.test_base_price import OFFER
from tests.twins.engine_twin import EngineTwin
from tests.twins.memory_store import MemoryStore

EPOCH_MS: Final = BASE_EPOCH_S * 1000
START: Final = 1_000 * EPOCH_MS


class HandClock:
    """The Clock port, moved by hand."""

    def __init__(self, now_ms: int = START) -> None:
        self.ms = now_ms

    def now_ms(self) -> int:
        return self.ms

    def monotonic(self) -> float:
        return self.ms / 1000

    async def sleep(self, seconds: float) -> None:
        self.ms += int(seconds * 1000)


class Meter:
    """A base price over a twin engine of four slots, a store in memory, and a clock."""

    def __init__(self, tariff: Tariff = SHEET) -> None:
        self.tariff, self.engine, self.store, self.clock = tariff, EngineTwin(slots=4), MemoryStore(), HandClock()
        self.restart()

    async def open(self) -> Meter:
        await self.store.open()
        return self

    def restart(self) -> None:
        self.price = BasePrice(self.engine, self.store, self.clock, "slot")

    async def busy(self, slots: int, seconds: float) -> None:
        """So many slots busy for so long, looked at every second."""
        self.engine.active = slots
        self.price.sample()
        for _ in range(int(seconds)):
            self.clock.ms += 1000
            self.price.sample()

    async def now(self) -> Step:
        return await self.price.current(self.tariff)

    async def offer(self) -> Offer:
        step = await self.now()
        return replace(
            OFFER,
            base_epoch=step.epoch,
            base_bps=step.base,
            base_parent_bps=step.parent,
            base_utilisation_bps=step.utilisation,
        )


@given(
    st.integers(0, 3 * EPOCH_MS),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, EPOCH_MS)), max_size=20),
)
def test_utilisation_is_busy_slot_time_over_all_slot_time(start: int, spans: list[tuple[int, int]]) -> None:
    """Against the plain sum, millisecond by millisecond in spans cut at the epochs."""
    meter, now, busy = Utilisation(), start, dict.fromkeys(range(100), 0)
    for active, length in spans:
        meter.see(active, now)
        cuts = [now, *range(-(-(now + 1) // EPOCH_MS) * EPOCH_MS, now + length, EPOCH_MS), now + length]
        for low, high in itertools.pairwise(cuts):
            busy[low // EPOCH_MS] += active * (high - low)
        now += length
    meter.see(0, now)
    for epoch in range(now // EPOCH_MS + 1):
        assert meter.take(epoch, 8) == busy[epoch] * BPS // (8 * EPOCH_MS)


def test_a_machine_that_slept_served_nobody_beyond_an_epoch() -> None:
    meter = Utilisation()
    meter.see(8, 0)
    meter.see(0, 10 * EPOCH_MS)
    assert [meter.take(epoch, 8) for epoch in range(3)] == [BPS, 0, 0]


def test_a_clock_set_back_counts_nothing_twice() -> None:
    meter = Utilisation()
    meter.see(8, 30_000)
    meter.see(8, 20_000)
    meter.see(0, 30_000)
    assert meter.take(0, 8) == 10_000 * BPS // EPOCH_MS


async def test_it_begins_at_one_and_follows_the_load() -> None:
    meter = await Meter().open()
    assert await meter.now() == Step(1_000, BPS, BPS, BPS // 2)
    await meter.busy(4, 60)
    assert await meter.now() == Step(1_001, 11_250, BPS, BPS)
    await meter.busy(2, 60)
    assert await meter.now() == Step(1_002, 11_250, 11_250, BPS // 2)
    await meter.busy(0, 60)
    assert await meter.now() == Step(1_003, BPS, 11_250, 0), "not below the bound"


async def test_within_an_epoch_it_stays() -> None:
    meter = await Meter().open()
    await meter.now()
    await meter.busy(4, 60)
    first = await meter.now()
    for slots in (0, 4, 1):
        await meter.busy(slots, 15)
        assert await meter.now() == first


async def test_a_crash_changes_no_epoch_s_multiplier() -> None:
    meter = await Meter().open()
    await meter.now()
    await meter.busy(4, 60)
    before = await meter.offer()
    await meter.busy(4, 30)
    meter.restart()
    assert await meter.offer() == before
    await meter.busy(4, 30)
    after = await meter.offer()
    assert after.base_parent_bps == before.base_bps and after.base_utilisation_bps == BPS // 2, (
        "what was not seen is idle"
    )
    assert not contradicts(before, after, SHEET)


async def test_epochs_nobody_saw_were_idle_and_only_the_last_step_is_stated() -> None:
    meter = await Meter(replace(SHEET, base_min_bps=100, base_max_bps=100_000)).open()
    await meter.now()
    meter.clock.ms += 5 * EPOCH_MS
    meter.restart()
    step, base = await meter.now(), BPS
    for _ in range(5):
        parent, base = base, next_base(meter.tariff, base, 0)
    assert step == Step(1_005, base, parent, 0)
    meter.clock.ms += 10**6 * EPOCH_MS
    assert (await meter.now()).base == 100


async def test_another_tariff_s_bounds_hold_at_once() -> None:
    meter = await Meter().open()
    await meter.now()
    meter.tariff = replace(SHEET, base_min_bps=15_000)
    assert (await meter.now()).base == 15_000
    check_base(await meter.offer(), meter.tariff)


async def test_nothing_is_stated_that_is_not_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = await Meter().open()
    await meter.now()
    await meter.busy(4, 60)
    put = meter.store.put_value

    async def fail(key: str, value: bytes) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(meter.store, "put_value", fail)
    with pytest.raises(StoreError):
        await meter.now()
    monkeypatch.setattr(meter.store, "put_value", put)
    step = await meter.now()
    assert step.utilisation == BPS, "what was measured is not lost with the write that failed"
    meter.restart()
    assert await meter.now() == step


async def test_who_asks_at_the_same_time_hears_the_same() -> None:
    meter = await Meter().open()
    await meter.now()
    await meter.busy(4, 60)
    assert len(set(await asyncio.gather(*(meter.now() for _ in range(5))))) == 1


async def test_jobs_may_name_what_a_live_offer_stated() -> None:
    meter, now_s = await Meter().open(), START // 1000
    assert meter.price.accepted() == frozenset()
    meter.price.offered(BPS, now_s + 100)
    meter.price.offered(11_250, now_s + 200)
    meter.price.offered(BPS, now_s + 50)
    assert meter.price.accepted() == {BPS, 11_250}
    meter.clock.ms += 100_000
    assert meter.price.accepted() == {11_250}


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 90), st.booleans()), min_size=1, max_size=12))
async def test_no_life_makes_evidence_against_its_provider(life: list[tuple[int, int, bool]]) -> None:
    """Whatever the load, and however often the node is killed: any two of its offers fit together and check out."""
    meter = await Meter(replace(SHEET, base_min_bps=1_000, base_max_bps=100_000)).open()
    offers = [await meter.offer()]
    for slots, seconds, killed in life:
        await meter.busy(slots, seconds)
        if killed:
            meter.restart()
        offers.append(await meter.offer())
    for i, offer in enumerate(offers):
        check_base(offer, meter.tariff)
        assert not any(contradicts(offer, later, SHEET) for later in offers[i:])
