"""The provider's price sheet and offer: signed, logged on chain, renewed, and served under from then on.

A tariff is persisted before it is signed and never changed under one sequence number; changed prices make the next
one, which the chain lets into force a full epoch after it is logged, so no payer is surprised.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from typing import Final

from node.ports import Chain, Clock, Directory, Engine, Entropy, Store, Transport
from node.provider.admission import Terms
from protocol.eip712 import digest
from protocol.messages import Offer, Tariff
from protocol.offers import seal_offer, text_hash
from protocol.packing import pack, packed_size, unpack
from protocol.sealing import BoxKey
from protocol.signing import Signer
from protocol.tariff import check_tariff
from protocol.units import BPS, Digest, Verifiability

log = logging.getLogger("tally.provider.offering")

OFFER_LIFE_S: Final = 1800
"""Life of one offer. Unit: s. Renewed at half of it, so a live provider never drops out of the market."""

TARIFF_LIFE_S: Final = 90 * 24 * 3600
"""Life of one tariff. Unit: s. Renewed a week before its end."""

TARIFF_RENEW_S: Final = 7 * 24 * 3600
BOX_KEY_LIFE_S: Final = 3600
"""How long one box key is offered. Unit: s. Then it still opens prompts sealed to older offers until the next change,
and is gone: content captured before that cannot be opened by whoever takes the machine later."""

BLOCK_MARGIN_S: Final = 2
"""Added to the epoch's delay: the block that logs the tariff may be a little later than the one we looked at."""

_KEY = "provider/tariff"
_LOGGED = "provider/tariff_logged"
_SEQUENCE = "provider/offer_sequence"


@dataclass(frozen=True, slots=True)
class OfferTexts:
    """What the offer says besides its numbers."""

    model: str
    region: str
    retention_hours: int
    max_output: int


class Offering:
    """Owns the tariffs in force and the newest offer; `renew` is called on a timer and when load changes."""

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
            {tariff_hash: tariff for tariff_hash, (tariff, _) in self._tariffs.items()},
        )

    def terms_in_force(self) -> bool:
        """Whether any of our tariffs is in force now."""
        now = self._clock.now_ms() // 1000
        return any(tariff.valid_from <= now < tariff.valid_until for tariff, _ in self._tariffs.values())

    async def prepare_tariff(self) -> int:
        """Have a tariff with the wanted prices in the chain's log; returns the Unix second it comes into force.

        Raises: ChainError, StoreError.
        """
        stored = await self._stored()
        now = self._clock.now_ms() // 1000
        if stored is not None:
            await self._admit(stored)
        if stored is None or not self._same_prices(stored) or stored.valid_until - now < TARIFF_RENEW_S:
            head = await self._chain.head()
            start = max(now, head.timestamp) + await self._chain.epoch_seconds() + BLOCK_MARGIN_S
            sequence = stored.sequence + 1 if stored else 1
            stored = replace(self._wanted, sequence=sequence, valid_from=start, valid_until=start + TARIFF_LIFE_S)
            await self._store.put_value(_KEY, pack(stored))
            await self._admit(stored)
        tariff_hash = digest(self._chain.domain, stored)
        if await self._chain.tariff(tariff_hash) is None:
            await self._chain.log_tariff(stored, self._signer.sign(self._chain.domain, stored))
        await self._store.put_value(_LOGGED, tariff_hash)
        return stored.valid_from

    async def recall_tariff(self) -> bool:
        """Without the chain: take up the stored tariff if it has our prices and is known to be logged."""
        stored = await self._stored()
        if stored is None or not self._same_prices(stored):
            return False
        if await self._store.get_value(_LOGGED) != digest(self._chain.domain, stored):
            return False
        await self._admit(stored)
        return True

    async def _stored(self) -> Tariff | None:
        raw = await self._store.get_value(_KEY)
        if raw is None or len(raw) != packed_size(Tariff):
            return None
        tariff = unpack(Tariff, raw)
        mine = (tariff.provider, tariff.profile_id) == (self._wanted.provider, self._wanted.profile_id)
        return tariff if mine else None

    def _same_prices(self, tariff: Tariff) -> bool:
        loose = {"sequence", "valid_from", "valid_until"}
        names = [item.name for item in fields(Tariff) if item.name not in loose]
        return all(getattr(tariff, name) == getattr(self._wanted, name) for name in names)

    async def _admit(self, tariff: Tariff) -> None:
        tariff_hash = digest(self._chain.domain, tariff)
        signature = self._signer.sign(self._chain.domain, tariff)
        await self._store.put_value(f"tariff/{tariff_hash.hex()}", pack(tariff) + signature)
        self._tariffs[tariff_hash] = (tariff, signature)

    async def renew(self) -> None:
        """Sign and announce a fresh offer under the newest tariff in force. Raises: StoreError."""
        now = self._clock.now_ms() // 1000
        in_force = [item for item in self._tariffs.items() if item[1][0].valid_from <= now < item[1][0].valid_until]
        if not in_force:
            log.info("no tariff is in force yet; nothing is offered")
            return
        tariff_hash, (tariff, signature) = max(in_force, key=lambda item: item[1][0].sequence)
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
            verifiability=Verifiability.REPLAY,
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
        await self._directory.announce(envelope)
