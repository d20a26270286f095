"""The base multiplier: one number per provider and profile that follows its public utilisation, the same for everybody.

The rule is EIP-1559's, on a share of slots instead of gas: at the target the price stays, a full epoch raises it by an
eighth, an idle one lowers it by an eighth, always within the bounds that the tariff published. Each offer states the
epoch's multiplier with the one before and the utilisation it follows from, so the rule is checked from one document,
and two offers of consecutive epochs that do not fit together are evidence.
Source: EIP-1559, "Fee market change for ETH 1.0 chain", https://eips.ethereum.org/EIPS/eip-1559 .
"""

from __future__ import annotations

from typing import Final

from protocol.errors import FieldOutOfRange
from protocol.messages import Offer, Tariff
from protocol.units import BPS

BASE_EPOCH_S: Final = 60
"""Length of a base epoch. Unit: s. Offers travel in seconds and a job is quoted under the offer at hand; doubling it
halves how fast price follows demand."""

TARGET_UTILISATION_BPS: Final = BPS // 2
"""Utilisation at which the multiplier stays. Unit: bps of slots. EIP-1559's half: room to grow as far as to shrink."""

CHANGE_DENOMINATOR: Final = 8
"""Largest change per epoch is one in so many. EIP-1559's value: x2 takes six full epochs."""


def base_epoch(now_s: int) -> int:
    """The epoch of a Unix second."""
    return now_s // BASE_EPOCH_S


def next_base(tariff: Tariff, parent_bps: int, utilisation_bps: int) -> int:
    """The multiplier after an epoch at `parent_bps` with that utilisation, bps; a rise is one bps at least."""
    gap = utilisation_bps - TARGET_UTILISATION_BPS
    step = parent_bps * abs(gap) // TARGET_UTILISATION_BPS // CHANGE_DENOMINATOR
    moved = parent_bps + max(1, step) if gap > 0 else parent_bps - step
    return min(max(moved, tariff.base_min_bps), tariff.base_max_bps)


def check_base(offer: Offer, tariff: Tariff) -> None:
    """Raises: FieldOutOfRange when the offer's multiplier does not follow from what it states."""
    if offer.base_utilisation_bps > BPS:
        raise FieldOutOfRange("Offer", "base_utilisation_bps", offer.base_utilisation_bps)
    if offer.base_bps != next_base(tariff, offer.base_parent_bps, offer.base_utilisation_bps):
        raise FieldOutOfRange("Offer", "base_bps", offer.base_bps)


def contradicts(earlier: Offer, later: Offer, tariff: Tariff) -> bool:
    """Whether two signed offers under one tariff cannot both be honest.

    A multiplier changed within its epoch, the next epoch started from another, or over the epochs nobody offered in it
    rose further than full load could have raised it.
    """
    if (earlier.provider, earlier.tariff_hash) != (later.provider, later.tariff_hash):
        return False
    passed = later.base_epoch - earlier.base_epoch
    if passed == 0:
        return earlier.base_bps != later.base_bps
    if passed == 1:
        return later.base_parent_bps != earlier.base_bps
    highest = earlier.base_bps
    for _ in range(passed):
        if later.base_bps <= highest:
            return False
        following = next_base(tariff, highest, BPS)
        if following == highest:  # at the bound, where more epochs change nothing
            return True
        highest = following
    return passed > 0 and later.base_bps > highest
