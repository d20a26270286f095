"""The provider's price sheet and offer: signed, logged on chain, renewed, and served under from then on.

A tariff is persisted before it is signed and never changed under one sequence number; changed prices make the next
one, which the chain lets into force a full epoch after it is logged, so no payer is surprised. It is offered once it is
in the chain's log and not before; one that came too late for the log is abandoned, its sequence number with it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, fields, replace
from typing import Final

from node.ports import Chain, ChainError, ChainUnavailable, Clock, Directory, Engine, Entropy, Store, Transport
from node.provider.admission import Terms
from node.provider.base import BasePrice
from node.provider.sequence import claim, load_tariff, tariff_slot
from protocol.eip712 import digest, hash_struct
from protocol.errors import TallyError
from protocol.messages import Offer, Tariff
from protocol.offers import seal_offer, text_hash
from protocol.packing import pack
from protocol.sealing import BoxKey
from protocol.signing import Signer
from protocol.tariff import check_tariff
from protocol.units import BPS, Digest

log = logging.getLogger("tally.provider.offering")

OFFER_LIFE_S: Final = 600
"""Life of one offer. Unit: s. Renewed at half of it, so a live provider never drops out of the market. Jobs may name
the multiplier of any live offer, so price follows demand no later than this: doubling it lets payers keep a multiplier
of before a rush twice as long, halving it doubles the gossip (about 1.2 KiB each time)."""

TARIFF_LIFE_S: Final = 90 * 24 * 3600
"""Life of one tariff. Unit: s. Renewed a week before its end."""

TARIFF_RENEW_S: Final = 7 * 24 * 3600
BOX_KEY_LIFE_S: Final = 3600
"""How long one box key is offered. Unit: s. Then it still opens prompts sealed to older offers until the next change,
and is gone: content captured before that cannot be opened by whoever takes the machine later."""

MIN_MARGIN_S: Final = 2
"""Added to the epoch's delay, or half an epoch where that is more. Unit: s. The block that logs the tariff comes later
than the one we looked at; whoever deploys the registry chooses an epoch that spans many blocks."""

MARGIN_GROWTH: Final = 4
"""Each further try has so many times the margin, for chains whose blocks are slower than that."""

LOG_ATTEMPTS: Final = 4
"""Tries to log a tariff in time. With an epoch of 60 s the last has a margin of half an hour."""

_SEQUENCE = "provider/offer_sequence"


class TariffElsewhere(TallyError):
    """A price sheet that this node cannot serve under."""


@dataclass(frozen=True, slots=True)
class OfferTexts:
    """What the offer says besides its numbers."""

    model: str
    region: str
    retention_hours: int
    max_output: int


class Offering:
    """Owns the tariffs in force and the newest offer; `renew` is called on a timer and when the base price moved."""

    def __init__(
        self,
        wanted: Tariff,
        texts: OfferTexts,
        signer: Signer,
        engine: Engine,
        store: Store,
        chain: Chain,
        transport: Transport,
        directory: Directory,
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        check_tariff(replace(wanted, valid_from=0, valid_until=1))
        self._wanted = wanted
        self._texts = texts
        self._signer = signer
        self._engine = engine
        self._store = store
        self._chain = chain
        self._transport = transport
        self._directory = directory
        self._clock = clock
        self._entropy = entropy
        self._boxes: list[tuple[BoxKey, float]] = []  # current last, at most two
        self._tariffs: dict[Digest, tuple[Tariff, bytes]] = {}
        self._base = BasePrice(engine, store, clock, self._slot("base"))
        self._base_offered: int | None = None
        self._tariff_offered: Digest | None = None
        self._renewing = asyncio.Lock()
        self._numbering = asyncio.Lock()

    def box_key(self, public: bytes) -> BoxKey | None:
        """The secret behind an offered box key, or None when it was never ours or is destroyed."""
        return next((box for box, _ in self._boxes if box.public == public), None)

    def _current_box(self) -> BoxKey:
        now = self._clock.monotonic()
        if not self._boxes or now - self._boxes[-1][1] >= BOX_KEY_LIFE_S:
            fresh = (BoxKey.from_secret(self._entropy.token(32)), now)
            self._boxes = [*self._boxes[-1:], fresh]
        return self._boxes[-1][0]

    def terms(self) -> Terms:
        """What jobs are admitted under."""
        return Terms(
            self._wanted.provider,
            self._wanted.profile_id,
            self._engine.max_context,
            self._texts.max_output,
            self._engine.vocab_size,
            self._engine.hidden_size,
            self._engine.profile,
            {tariff_hash: tariff for tariff_hash, (tariff, _) in self._tariffs.items()},
            self._base.accepted(),
        )

    def terms_in_force(self) -> bool:
        """Whether any of our tariffs is in force now."""
        now = self._clock.now_ms() // 1000
        return any(tariff.valid_from <= now < tariff.valid_until for tariff, _ in self._tariffs.values())

    async def prepare_tariff(self) -> int:
        """Have a tariff with the wanted prices in the chain's log; returns the Unix second it comes into force.

        Raises: ChainError, StoreError.
        """
        logged = await self._load("logged")
        if logged is not None and await self._chain.tariff(digest(self._chain.domain, logged)) is not None:
            await self._admit(logged)
        for attempt in range(LOG_ATTEMPTS):
            tariff = await self._loggable(MARGIN_GROWTH**attempt)
            if await self._log(tariff, last_try=attempt == LOG_ATTEMPTS - 1):
                await self._store.put_value(self._slot("logged"), pack(tariff))
                await self._admit(tariff)
                return tariff.valid_from
        raise AssertionError("the last try logs the tariff or raises")

    async def claim(self, tariff: Tariff, least: int) -> Tariff:
        """A number for a sheet that the operator will sign, never one of ours. Raises: TariffElsewhere, StoreError."""
        self._check_ours(tariff)
        async with self._numbering:
            return await claim(self._store, self._chain.domain, tariff, least)

    async def adopt(self, tariff: Tariff) -> None:
        """Go on under a sheet that is in the chain's log: offered from its date, renewed with its prices.

        Raises: TariffElsewhere, ChainError, StoreError; then everything stays as it was.
        """
        self._check_ours(tariff)
        if await self._chain.tariff(digest(self._chain.domain, tariff)) is None:
            raise TariffElsewhere("the tariff is not in the chain's log, so nothing can be offered under it")
        async with self._numbering:
            signed = await self._load("signed")
            if signed is None or tariff.sequence >= signed.sequence:
                await self._store.put_value(self._slot("signed"), pack(tariff))
            await self._store.put_value(self._slot("logged"), pack(tariff))
            await self._admit(tariff)
            self._wanted = tariff

    def _check_ours(self, tariff: Tariff) -> None:
        """Raises: TariffElsewhere."""
        ours = self._wanted
        if (tariff.provider, tariff.profile_id) != (ours.provider, ours.profile_id):
            raise TariffElsewhere(
                f"the tariff is of wallet 0x{tariff.provider.hex()} and profile 0x{tariff.profile_id.hex()}; this node "
                f"serves wallet 0x{ours.provider.hex()} and profile 0x{ours.profile_id.hex()}"
            )

    async def _loggable(self, patience: int) -> Tariff:
        """The newest signed tariff if it is in the log or can still come there in time, else the next, persisted."""
        async with self._numbering:
            return await self._loggable_now(patience)

    async def _loggable_now(self, patience: int) -> Tariff:
        signed = await self._load("signed")
        head, epoch = await self._chain.head(), await self._chain.epoch_seconds()
        earliest = max(self._clock.now_ms() // 1000, head.timestamp) + epoch
        last = await self._chain.last_sequence(self._wanted.provider, self._wanted.profile_id)
        if self._wanted.sequence > (signed.sequence if signed else 0):
            signed = self._wanted  # its operator signed it elsewhere
            await self._store.put_value(self._slot("signed"), pack(signed))
        # A number claimed for a sheet that its operator has not logged yet must not make us log another.
        for known in (signed, await self._load("logged")):
            if known is not None and self._lasting(known):
                if await self._chain.tariff(digest(self._chain.domain, known)) is not None:
                    return known
                if known is signed and known.sequence > last and known.valid_from >= earliest + MIN_MARGIN_S:
                    return known
        start = earliest + max(MIN_MARGIN_S, epoch // 2) * patience
        tariff = replace(self._wanted, valid_from=start, valid_until=start + TARIFF_LIFE_S)
        return await claim(self._store, self._chain.domain, tariff, last + 1)

    async def _log(self, tariff: Tariff, *, last_try: bool) -> bool:
        """Whether it is in the chain's log now; False when it came too late, and a later date may do.

        Raises: ChainError.
        """
        if await self._chain.tariff(digest(self._chain.domain, tariff)) is not None:
            return True
        try:
            await self._chain.log_tariff(tariff, self._signer.sign(self._chain.domain, tariff))
        except ChainUnavailable:
            raise
        except ChainError as exc:
            if last_try or not await self._came_late(tariff):
                raise
            log.warning("tariff %d came too late for the chain's log, signing the next: %s", tariff.sequence, exc)
            return False
        return True

    async def _came_late(self, tariff: Tariff) -> bool:
        """Whether its date, or a sequence number logged meanwhile, can be why the chain refused it."""
        head, epoch = await self._chain.head(), await self._chain.epoch_seconds()
        last = await self._chain.last_sequence(tariff.provider, tariff.profile_id)
        earliest = max(self._clock.now_ms() // 1000, head.timestamp) + epoch
        return tariff.valid_from < earliest + MIN_MARGIN_S or tariff.sequence <= last

    async def recall_tariff(self) -> bool:
        """Without the chain: take up the tariff last known to be logged, if it has our prices. Raises: StoreError."""
        logged = await self._load("logged")
        if logged is None or not self._same_prices(logged):
            return False
        await self._admit(logged)
        return True

    def _slot(self, kind: str) -> str:
        return tariff_slot(kind, self._chain.domain, self._wanted)

    async def _load(self, kind: str) -> Tariff | None:
        return await load_tariff(self._store, kind, self._chain.domain, self._wanted)

    def _lasting(self, tariff: Tariff) -> bool:
        return self._same_prices(tariff) and tariff.valid_until - self._clock.now_ms() // 1000 >= TARIFF_RENEW_S

    def _same_prices(self, tariff: Tariff) -> bool:
        loose = {"sequence", "valid_from", "valid_until"}
        names = [item.name for item in fields(Tariff) if item.name not in loose]
        return all(getattr(tariff, name) == getattr(self._wanted, name) for name in names)

    async def _admit(self, tariff: Tariff) -> None:
        tariff_hash = digest(self._chain.domain, tariff)
        signature = self._signer.sign(self._chain.domain, tariff)
        await self._store.put_value(f"tariff/{tariff_hash.hex()}", pack(tariff) + signature)
        profile = self._engine.profile
        await self._store.put_value(f"profile/{hash_struct(profile).hex()}", pack(profile))
        self._tariffs[tariff_hash] = (tariff, signature)

    async def base_moved(self) -> bool:
        """Look at the engine's load; whether this epoch's base multiplier, or the tariff in force, is another than the
        offer's.

        Call every `SAMPLE_S` seconds, and renew the offer when it is. Raises: StoreError.
        """
        newest = self._newest()
        if newest is None:
            return False
        base = (await self._base.current(newest[1])).base
        return (newest[0], base) != (self._tariff_offered, self._base_offered)

    def _newest(self) -> tuple[Digest, Tariff, bytes] | None:
        """The tariff that offers are made under now: its hash, itself, its signature."""
        now = self._clock.now_ms() // 1000
        in_force = [item for item in self._tariffs.items() if item[1][0].valid_from <= now < item[1][0].valid_until]
        if not in_force:
            return None
        tariff_hash, (tariff, signature) = max(in_force, key=lambda item: item[1][0].sequence)
        return tariff_hash, tariff, signature

    def standing(self) -> tuple[Tariff, Digest, int] | None:
        """The tariff that is offered under now, its hash, and the base multiplier; None when nothing is offered."""
        newest = self._newest()
        if newest is None or self._base_offered is None:
            return None
        return newest[1], newest[0], self._base_offered

    async def renew(self) -> None:
        """Sign and announce a fresh offer under the newest tariff in force. Raises: StoreError."""
        async with self._renewing:
            newest = self._newest()
            if newest is None:
                log.info("no tariff is in force yet; nothing is offered")
            else:
                await self._announce(*newest)

    async def _announce(self, tariff_hash: Digest, tariff: Tariff, signature: bytes) -> None:
        now = self._clock.now_ms() // 1000
        step = await self._base.current(tariff)
        last = await self._store.get_value(_SEQUENCE)
        sequence = max(int.from_bytes(last or b"", "big") + 1, self._clock.now_ms())
        await self._store.put_value(_SEQUENCE, sequence.to_bytes(8, "big"))
        stats = self._engine.stats()
        offer = Offer(
            provider=tariff.provider,
            sequence=sequence,
            box_key=Digest(self._current_box().public),
            model_hash=text_hash(self._texts.model),
            profile_id=tariff.profile_id,
            slots=stats.slots,
            load_bps=min(BPS, stats.active * BPS // max(1, stats.slots)),
            max_context=self._engine.max_context,
            max_output=self._texts.max_output,
            tariff_hash=tariff_hash,
            region_hash=text_hash(self._texts.region),
            retention_hours=self._texts.retention_hours,
            verifiability=self._engine.verifiability,
            base_epoch=step.epoch,
            base_bps=step.base,
            base_parent_bps=step.parent,
            base_utilisation_bps=step.utilisation,
            expires_at=now + OFFER_LIFE_S,
        )
        envelope = seal_offer(
            self._chain.domain,
            self._signer,
            offer,
            tariff,
            signature,
            peer_id=self._transport.peer_id,
            addresses=self._transport.addresses,
            model=self._texts.model,
            region=self._texts.region,
        )
        self._base.offered(step.base, offer.expires_at)
        self._base_offered, self._tariff_offered = step.base, tariff_hash
        await self._directory.announce(envelope)
