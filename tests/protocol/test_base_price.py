"""The base multiplier: within its bounds, rising with load and never by more than an eighth, and a lie is evidence."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from protocol.base_price import (
    BASE_EPOCH_S,
    CHANGE_DENOMINATOR,
    TARGET_UTILISATION_BPS,
    base_epoch,
    check_base,
    contradicts,
    next_base,
)
from protocol.errors import FieldOutOfRange
from protocol.messages import Offer, Tariff
from protocol.units import BPS, ZERO_ADDRESS, ZERO_DIGEST, Address, Digest
from tests.protocol.sheets import SHEET, tariffs

OFFER: Final = Offer(
    provider=ZERO_ADDRESS,
    sequence=1,
    box_key=ZERO_DIGEST,
    model_hash=ZERO_DIGEST,
    profile_id=ZERO_DIGEST,
    slots=8,
    load_bps=0,
    max_context=4096,
    max_output=1024,
    tariff_hash=ZERO_DIGEST,
    region_hash=ZERO_DIGEST,
    retention_hours=0,
    verifiability=2,
    base_epoch=100,
    base_bps=10_000,
    base_parent_bps=10_000,
    base_utilisation_bps=TARGET_UTILISATION_BPS,
    expires_at=0,
)
WIDE: Final = replace(SHEET, base_min_bps=1, base_max_bps=1_000_000)
shares = st.integers(0, BPS)
bases = st.integers(1, 1_000_000)


@given(tariffs(), st.integers(0, 2**32 - 1), shares)
def test_it_never_leaves_its_bounds(tariff: Tariff, parent: int, utilisation: int) -> None:
    """Even from a multiplier that an earlier tariff had allowed."""
    assert tariff.base_min_bps <= next_base(tariff, parent, utilisation) <= tariff.base_max_bps


@given(bases, shares, shares)
def test_more_load_never_lowers_it(parent: int, one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert next_base(WIDE, parent, low) <= next_base(WIDE, parent, high)


@given(bases, bases, shares)
def test_a_higher_multiplier_stays_the_higher(one: int, other: int, utilisation: int) -> None:
    low, high = sorted((one, other))
    assert next_base(WIDE, low, utilisation) <= next_base(WIDE, high, utilisation)


@given(st.integers(CHANGE_DENOMINATOR, 800_000), shares)
def test_an_epoch_moves_it_towards_its_load_by_an_eighth_at_most(parent: int, utilisation: int) -> None:
    moved = next_base(WIDE, parent, utilisation)
    assert abs(moved - parent) <= max(1, parent // CHANGE_DENOMINATOR)
    if utilisation > TARGET_UTILISATION_BPS:
        assert moved > parent
    else:
        assert moved <= parent


def test_full_and_idle_epochs_move_it_by_an_eighth_and_the_target_leaves_it() -> None:
    assert next_base(WIDE, 10_000, BPS) == 11_250
    assert next_base(WIDE, 10_000, 0) == 8_750
    assert next_base(WIDE, 10_000, TARGET_UTILISATION_BPS) == 10_000
    assert next_base(WIDE, 10_000, TARGET_UTILISATION_BPS + 1) == 10_001, "a rise is one bps at least"


@given(tariffs(), bases)
def test_an_idle_provider_s_multiplier_falls_to_its_bound(tariff: Tariff, parent: int) -> None:
    assume(tariff.base_min_bps >= CHANGE_DENOMINATOR)
    for _ in range(200):
        parent = next_base(tariff, parent, 0)
    assert parent - tariff.base_min_bps <= 0


@given(tariffs(), bases, shares, st.integers(-3, 3))
def test_an_offer_states_what_its_multiplier_follows_from(tariff: Tariff, parent: int, share: int, lie: int) -> None:
    honest = next_base(tariff, parent, share)
    offer = replace(OFFER, base_bps=honest, base_parent_bps=parent, base_utilisation_bps=share)
    check_base(offer, tariff)
    if lie:
        with pytest.raises(FieldOutOfRange, match="base_bps"):
            check_base(replace(offer, base_bps=honest + lie), tariff)


def test_more_than_all_slots_cannot_be_busy() -> None:
    with pytest.raises(FieldOutOfRange, match="base_utilisation_bps"):
        check_base(replace(OFFER, base_utilisation_bps=BPS + 1), SHEET)


@given(st.lists(shares, min_size=2, max_size=10), st.data())
def test_an_honest_life_is_no_evidence_and_any_other_multiplier_in_it_is(life: list[int], data: st.DataObject) -> None:
    offers, base = [], 10_000
    for epoch, share in enumerate(life):
        step = next_base(WIDE, base, share)
        offers.append(replace(OFFER, base_epoch=epoch, base_bps=step, base_parent_bps=base, base_utilisation_bps=share))
        base = step
    assert not any(contradicts(a, b, WIDE) for i, a in enumerate(offers) for b in offers[i:])
    at = data.draw(st.integers(0, len(offers) - 1))
    lie = replace(offers[at], base_bps=offers[at].base_bps + data.draw(st.integers(1, 100)))
    assert contradicts(offers[at], lie, WIDE)
    if at + 1 < len(offers):
        assert contradicts(lie, offers[at + 1], WIDE)


def test_only_offers_of_one_provider_under_one_tariff_can_contradict() -> None:
    lie = replace(OFFER, base_bps=20_000)
    assert contradicts(OFFER, lie, WIDE)
    assert not contradicts(OFFER, replace(lie, provider=Address(b"\x01" * 20)), WIDE)
    assert not contradicts(OFFER, replace(lie, tariff_hash=Digest(b"\x01" * 32)), WIDE)


@pytest.mark.parametrize(("epochs", "highest"), [(2, 12_656), (3, 14_238), (6, 20_271), (50, 1_000_000)])
def test_over_epochs_nobody_offered_in_it_rises_as_far_as_full_load_raises_it(epochs: int, highest: int) -> None:
    later = replace(OFFER, base_epoch=OFFER.base_epoch + epochs)
    assert not contradicts(OFFER, replace(later, base_bps=highest), WIDE)
    assert contradicts(OFFER, replace(later, base_bps=highest + 1), WIDE)
    assert not contradicts(OFFER, replace(later, base_bps=1), WIDE), "it may have been idle"


def test_an_epoch_is_a_minute() -> None:
    assert base_epoch(BASE_EPOCH_S * 7 - 1) == 6
    assert base_epoch(BASE_EPOCH_S * 7) == 7
