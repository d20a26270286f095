"""The provider's base multiplier: utilisation measured, epochs rolled, and every value on disk before it is offered.

Contract: within one epoch and tariff the multiplier never changes, also across a crash, and the next epoch starts from
it (protocol/base_price.py calls anything else evidence). Epochs that nobody measured, because the node was down or
asleep, count as idle: the multiplier falls by the rule, epoch by epoch, and the offer states the last step.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import Final

from node.ports import Clock, Engine, Store
from protocol.base_price import BASE_EPOCH_S, TARGET_UTILISATION_BPS, base_epoch, next_base
from protocol.messages import Tariff
from protocol.units import BPS

SAMPLE_S: Final = 1.0
"""How often the engine is asked how many slots are busy. Unit: s. Sixty looks an epoch; a job shorter than a second is
seen by chance, in proportion to its length, so many of them are counted right. Halving it changes nothing else."""

MAX_STEPS: Final = 2_000
"""Idle epochs that are stepped through one by one. Unit: epochs. From x100 to 1 bps takes below 150; beyond that every
multiplier stands at its lower bound."""

_EPOCH_MS: Final = BASE_EPOCH_S * 1000
_STEP: Final = struct.Struct(">QIII")


@dataclass(frozen=True, slots=True)
class Step:
    """What an offer states: the epoch's multiplier, the one before, and the utilisation it follows from. In bps."""

    epoch: int
    base: int
    parent: int
    utilisation: int


class Utilisation:
    """Busy slots over time, as a share of all slots, per epoch. Times in Unix ms."""

    def __init__(self) -> None:
        self._busy_ms: dict[int, int] = {}  # epoch -> slot-milliseconds, of epochs that are not taken yet
        self._active = 0
        self._seen_ms: int | None = None

    def see(self, active: int, now_ms: int) -> None:
        """`active` slots are busy from now on. What was seen last is taken to have lasted until now, but no longer than
        one epoch: a machine that slept served nobody."""
        if self._seen_ms is not None:
            start, end = self._seen_ms, min(now_ms, self._seen_ms + _EPOCH_MS)
            while start < end:
                epoch = start // _EPOCH_MS
                until = min(end, (epoch + 1) * _EPOCH_MS)
                self._busy_ms[epoch] = self._busy_ms.get(epoch, 0) + self._active * (until - start)
                start = until
        self._active, self._seen_ms = active, now_ms

    def take(self, epoch: int, slots: int) -> int:
        """Utilisation of a past epoch, bps, rounded down; that and all before it is forgotten."""
        busy = self._busy_ms.get(epoch, 0)
        self._busy_ms = {known: ms for known, ms in self._busy_ms.items() if known > epoch}
        return min(BPS, busy * BPS // (max(1, slots) * _EPOCH_MS))


class BasePrice:
    """The multiplier of one provider and profile. `slot`: where the store keeps it."""

    def __init__(self, engine: Engine, store: Store, clock: Clock, slot: str) -> None:
        self._engine, self._store, self._clock, self._slot = engine, store, clock, slot
        self._utilisation = Utilisation()
        self._step: Step | None = None
        self._durable: Step | None = None
        self._lock = asyncio.Lock()  # from taking an epoch's utilisation until its step is on disk
        self._offered: dict[int, int] = {}  # multiplier -> Unix second its last offer expires

    def sample(self) -> None:
        """Look at the engine. Call every `SAMPLE_S` seconds."""
        self._utilisation.see(self._engine.stats().active, self._clock.now_ms())

    async def current(self, tariff: Tariff) -> Step:
        """This epoch's step under the tariff, durable when it returns. Raises: StoreError."""
        async with self._lock:
            self.sample()
            if self._step is None:
                self._step = self._durable = await self._load()
            step = self._step = self._advanced(self._step, tariff)
            if step != self._durable:
                packed = _STEP.pack(step.epoch, step.base, step.parent, step.utilisation)
                await self._store.put_value(self._slot, packed)
                self._durable = step
            return step

    def offered(self, base: int, expires_at: int) -> None:
        """An offer that states `base` was announced; jobs may name it until `expires_at`, Unix s."""
        self._offered[base] = max(expires_at, self._offered.get(base, 0))

    def accepted(self) -> frozenset[int]:
        """The multipliers that jobs may name now: those of live offers."""
        now = self._clock.now_ms() // 1000
        self._offered = {base: until for base, until in self._offered.items() if until > now}
        return frozenset(self._offered)

    async def _load(self) -> Step | None:
        raw = await self._store.get_value(self._slot)
        if raw is None or len(raw) != _STEP.size:
            return None
        return Step(*_STEP.unpack(raw))

    def _advanced(self, step: Step | None, tariff: Tariff) -> Step:
        epoch, slots = base_epoch(self._clock.now_ms() // 1000), self._engine.stats().slots
        if step is None:
            # The first ever: from x1, as if the epoch before had been at the target.
            return Step(epoch, next_base(tariff, BPS, TARGET_UTILISATION_BPS), BPS, TARGET_UTILISATION_BPS)
        # A new tariff may have other bounds; a clock that was set back rolls nothing.
        step = Step(step.epoch, next_base(tariff, step.parent, step.utilisation), step.parent, step.utilisation)
        for done in range(max(step.epoch, epoch - MAX_STEPS), epoch):
            share = self._utilisation.take(done, slots)
            step = Step(done + 1, next_base(tariff, step.base, share), step.base, share)
        return step
