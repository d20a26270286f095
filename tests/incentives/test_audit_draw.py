"""The beacon's draws: fixed by vectors, fair, and impossible to know before the beacon."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.audit_draw import (
    FIRST_JOBS,
    GAP_TOLERANCE_MILLI,
    GAPS,
    GAPS_TO_MATCH,
    beacon_of,
    case_key,
    gap_positions,
    gaps_match,
    is_drawn,
    is_forced,
    lot_of,
    median_gaps,
    pack_gaps,
    unpack_gaps,
)
from protocol.errors import FieldOutOfRange
from protocol.units import Address, Digest, JobId
from tests.protocol.sheets import ON_SLOW_CPU

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "audit.json").read_text())
BEACON = Digest(bytes.fromhex(VECTORS["beacon"]))
vectors = st.lists(st.integers(-32_768, 32_767), min_size=GAPS, max_size=GAPS)


def word(number: int) -> Digest:
    return Digest(hashlib.sha256(number.to_bytes(8, "big")).digest())


def test_the_first_jobs_are_all_audited() -> None:
    assert all(is_drawn(BEACON, JobId(word(number)), place) for number in range(5) for place in range(FIRST_JOBS))


def test_later_jobs_are_audited_at_the_floor() -> None:
    drawn = sum(is_drawn(BEACON, JobId(word(number)), FIRST_JOBS) for number in range(20_000))
    assert 320 <= drawn <= 480
    other = sum(is_drawn(word(7), JobId(word(number)), FIRST_JOBS) for number in range(20_000))
    assert 320 <= other <= 480


def test_another_beacon_draws_other_jobs() -> None:
    def chosen(beacon: Digest) -> set[int]:
        return {number for number in range(5_000) if is_drawn(beacon, JobId(word(number)), 99)}

    assert chosen(BEACON) != chosen(word(1)) and len(chosen(BEACON) & chosen(word(1))) < 15


def test_errors_are_forced_as_often_as_the_rule_says() -> None:
    assert not any(is_forced(word(number), BEACON, 0) for number in range(100))
    assert all(is_forced(word(number), BEACON, 10_000) for number in range(100))
    assert 320 <= sum(is_forced(word(number), BEACON, 200) for number in range(20_000)) <= 480


def test_the_vectors_hold() -> None:
    for provider, profile, epoch, key in VECTORS["case_key"]:
        found = case_key(Address(bytes.fromhex(provider)), Digest(bytes.fromhex(profile)), epoch)
        assert found.hex() == key
    for secret, lot in VECTORS["lot"]:
        assert lot_of(bytes.fromhex(secret)).hex() == lot
    for lengths, positions in VECTORS["gap_positions"]:
        assert [list(pair) for pair in gap_positions(BEACON, lengths)] == positions
    for one, other, alike in VECTORS["gaps_match"]:
        assert gaps_match(bytes.fromhex(one), bytes.fromhex(other)) is alike
    for count, median in VECTORS["median"]:
        assert median_gaps([bytes.fromhex(text) for text in VECTORS["gaps"][:count]]).hex() == median
    assert beacon_of(BEACON, word(1)) != beacon_of(BEACON, word(2))


# --------------------------------------------------------------------------------------------------------------- gaps


@ON_SLOW_CPU
@given(st.lists(st.integers(0, 200), max_size=12), st.binary(min_size=32, max_size=32))
def test_every_position_is_a_token_of_its_job(lengths: list[int], beacon: bytes) -> None:
    positions = gap_positions(Digest(beacon), lengths)
    assert len(positions) == (GAPS if sum(lengths) else 0)
    assert all(0 <= at < lengths[job] for job, at in positions)


def test_positions_spread_over_all_tokens() -> None:
    seen = {pair for number in range(400) for pair in gap_positions(word(number), [3, 0, 5])}
    assert seen == {*((0, at) for at in range(3)), *((2, at) for at in range(5))}


@ON_SLOW_CPU
@given(vectors)
def test_gaps_come_back_as_they_were_packed(gaps: list[int]) -> None:
    assert list(unpack_gaps(pack_gaps(gaps))) == gaps


def test_gaps_are_clamped_and_filled() -> None:
    assert unpack_gaps(pack_gaps([99_999, -99_999])) == (32_767, -32_768, *[0] * 14)
    with pytest.raises(FieldOutOfRange):
        pack_gaps([0] * 17)
    with pytest.raises(FieldOutOfRange):
        unpack_gaps(bytes(31))


@ON_SLOW_CPU
@given(vectors, st.lists(st.integers(-GAP_TOLERANCE_MILLI, GAP_TOLERANCE_MILLI), min_size=GAPS, max_size=GAPS))
def test_noise_within_tolerance_matches_and_is_mutual(gaps: list[int], noise: list[int]) -> None:
    near = pack_gaps([gap + off for gap, off in zip(gaps, noise, strict=True)])
    assert gaps_match(pack_gaps(gaps), near) and gaps_match(near, pack_gaps(gaps))


@ON_SLOW_CPU
@given(
    st.lists(st.integers(-10_000, 10_000), min_size=GAPS, max_size=GAPS), st.integers(0, GAPS), st.integers(151, 999)
)
def test_so_many_must_match(gaps: list[int], off: int, by: int) -> None:
    bent = [gap + by * (number < off) for number, gap in enumerate(gaps)]
    assert gaps_match(pack_gaps(gaps), pack_gaps(bent)) is (GAPS - off >= GAPS_TO_MATCH)


@ON_SLOW_CPU
@given(vectors, st.lists(vectors, max_size=3), st.data())
def test_no_minority_moves_the_median(true: list[int], lies: list[list[int]], data: st.DataObject) -> None:
    """f liars of 2 f + 1: each median lies between what honest members measured."""
    noise = st.lists(st.integers(-60, 60), min_size=GAPS, max_size=GAPS)
    honest = [
        [max(-32_768, min(32_767, gap + off)) for gap, off in zip(true, data.draw(noise), strict=True)]
        for _ in range(len(lies) + 1)
    ]
    median = unpack_gaps(median_gaps([pack_gaps(row) for row in [*honest, *lies]]))
    for at in range(GAPS):
        column = [row[at] for row in honest]
        assert min(column) <= median[at] <= max(column)


def test_no_vectors_have_no_median() -> None:
    with pytest.raises(IndexError):
        median_gaps([])
