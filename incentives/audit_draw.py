"""What the beacon of a commitment decides: which jobs are audited, where gaps are measured, whether an error was due.

The beacon is fixed by the chain after the commitment was posted, so a provider that commits cannot know any of it, and
everybody computes the same afterwards. Mirrored in contracts/src/Court.sol where the contract needs it
(tests/vectors/audit.json). Assumption: whoever makes blocks could throw one away to draw again, at the block's price.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from eth_hash.auto import keccak

from protocol.errors import FieldOutOfRange
from protocol.units import BPS, Address, Digest, JobId

FIRST_JOBS: Final = 50
"""Jobs of a provider and profile that are all audited before the draw begins. Doubling it doubles what a newcomer's
audits cost, and how long a cheat has to serve honestly before it may hope."""

AUDIT_FLOOR_BPS: Final = 200
"""Share of later jobs that is audited: 2 %. Doubling it doubles the cost of auditing and halves the stake needed."""

GAPS: Final = 16
"""Positions at which a verdict states the gap between the best and the second score. One Verdict word holds 16 int16;
a copied or guessed vector matches in each with a probability of a few percent."""

GAP_TOLERANCE_MILLI: Final = 150
"""Distance at which two gaps still match, thousandths of a logit: the tolerance of margins at the nucleus' edge.
Doubling it doubles the chance of a guess."""

GAPS_TO_MATCH: Final = 12
"""Gaps of 16 that must match. Fewer would let guesses through, more would punish rare numeric noise."""

_INT16: Final = (1 << 15) - 1
_TAG_GAP: Final = b"tally/gap/1"


def case_key(provider: Address, profile_id: Digest, epoch: int) -> Digest:
    """Id of a commitment and of its case: keccak256(abi.encode(provider, profileId, epoch))."""
    return Digest(keccak(provider.rjust(32, b"\0") + profile_id + epoch.to_bytes(32, "big")))


def beacon_of(block_hash: Digest, key: Digest) -> Digest:
    """keccak256(abi.encode(block hash, key)): each commitment's own, of one block."""
    return Digest(keccak(block_hash + key))


def is_drawn(beacon: Digest, job_id: JobId, place: int) -> bool:
    """Whether the job is audited. `place`: jobs that its provider committed to before it under the profile, those
    ahead of it in the same tree included."""
    if place < FIRST_JOBS:
        return True
    return int.from_bytes(hashlib.sha256(beacon + job_id).digest(), "big") * BPS < AUDIT_FLOOR_BPS << 256


# ------------------------------------------------------------------------------------------------------ forced errors


def lot_of(secret: bytes) -> Digest:
    """What a commitment shows of its secret. A hash commitment with one use gives what a VRF gives: one value fixed
    before the beacon, known to nobody else, and checked with one hash. Source: RANDAO-style commitments."""
    return Digest(keccak(secret))


def is_forced(secret: bytes, beacon: Digest, forced_bps: int) -> bool:
    """Whether the commitment after the one with this secret and beacon must hold an error made on purpose."""
    return int.from_bytes(keccak(secret + beacon), "big") % BPS < forced_bps


# --------------------------------------------------------------------------------------------------------------- gaps


def gap_positions(beacon: Digest, lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """16 (job, token) pairs over the outputs of the audited jobs laid end to end, with repetition; () for no tokens.

    `lengths`: output tokens of each audited generation job that is not private, by job id.
    """
    ends = list(accumulate(lengths))
    if not ends or ends[-1] == 0:
        return ()
    out = []
    for index in range(GAPS):
        word = hashlib.sha256(_TAG_GAP + beacon + bytes([index])).digest()
        at = int.from_bytes(word, "big") % ends[-1]
        job = next(number for number, end in enumerate(ends) if at < end)
        out.append((job, at - (ends[job] - lengths[job])))
    return tuple(out)


def pack_gaps(milli: Sequence[int]) -> Digest:
    """As 16 big-endian int16, clamped; zeros where there are none. Raises: FieldOutOfRange for more than 16."""
    if len(milli) > GAPS:
        raise FieldOutOfRange("Verdict", "gaps", len(milli))
    clamped = [max(-_INT16 - 1, min(_INT16, gap)) for gap in milli] + [0] * (GAPS - len(milli))
    return Digest(b"".join(gap.to_bytes(2, "big", signed=True) for gap in clamped))


def unpack_gaps(gaps: bytes) -> tuple[int, ...]:
    """The 16 gaps, thousandths of a logit. Raises: FieldOutOfRange unless 32 bytes."""
    if len(gaps) != 2 * GAPS:
        raise FieldOutOfRange("Verdict", "gaps", gaps)
    return tuple(int.from_bytes(gaps[at : at + 2], "big", signed=True) for at in range(0, 2 * GAPS, 2))


def gaps_match(a: bytes, b: bytes) -> bool:
    """Whether both were measured on the same work: at least 12 of 16 within 0.15 logits. Raises: FieldOutOfRange."""
    near = sum(
        abs(one - other) <= GAP_TOLERANCE_MILLI for one, other in zip(unpack_gaps(a), unpack_gaps(b), strict=True)
    )
    return near >= GAPS_TO_MATCH


def lower_median(values: Sequence[int]) -> int:
    """The middle value, the lower of two. Raises: IndexError for none."""
    return sorted(values)[(len(values) - 1) // 2]


def median_gaps(vectors: Sequence[bytes]) -> Digest:
    """The lower median at each position: no minority moves it beyond what honest members measured.

    Raises: IndexError for no vectors, FieldOutOfRange.
    """
    columns = list(zip(*(unpack_gaps(vector) for vector in vectors), strict=True))
    return pack_gaps([lower_median(column) for column in columns] if columns else [lower_median([])])
