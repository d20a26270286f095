"""Channels, offers and candidates to vary."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from incentives.channel import Channel
from incentives.ledger import ChannelKey
from incentives.selection import Candidate, Needs
from protocol.base_price import base_epoch
from protocol.messages import Offer
from protocol.units import BPS, ZERO_DIGEST, Address, Tier, Verifiability, Wei
from tests.protocol.sheets import SHEET

NOW: Final = SHEET.valid_from + 1_000


def address(number: int) -> Address:
    return Address(number.to_bytes(20, "big"))


def channel(client: int, *, deposit: int, claimed: int = 0, vouched: int = 0, exit_at: int = 0) -> Channel:
    """A channel of provider 1 that owes what it vouched for."""
    key = ChannelKey(address(1), address(client))
    return Channel(key, Wei(deposit), Wei(claimed), exit_at, Wei(vouched), Wei(vouched))


def candidate(
    provider: int, *, queue_ms: int | None = None, tariff: dict[str, int] | None = None, **offer: int
) -> Candidate:
    """An offer of `provider` at the sheet's prices; `tariff`, `offer`: fields that differ."""
    made = Offer(
        provider=address(provider),
        sequence=1,
        box_key=ZERO_DIGEST,
        model_hash=ZERO_DIGEST,
        profile_id=ZERO_DIGEST,
        slots=8,
        load_bps=0,
        max_context=10_000,
        max_output=4_000,
        tariff_hash=ZERO_DIGEST,
        region_hash=ZERO_DIGEST,
        retention_hours=0,
        verifiability=Verifiability.REPLAY,
        base_epoch=base_epoch(NOW),
        base_bps=BPS,
        base_parent_bps=BPS,
        base_utilisation_bps=0,
        expires_at=NOW + 1_800,
    )
    return Candidate(replace(made, **offer), replace(SHEET, provider=address(provider), **(tariff or {})), queue_ms)


NEEDS: Final = Needs(None, 1_000, 500, Tier.STANDARD, False, Wei(10**24))
