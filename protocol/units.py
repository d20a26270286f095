"""The vocabulary: what the other files count in and point at. Imports nothing of ours.

Money is an integer number of wei of TALLY (1 TALLY = 10**18 wei). Prices are wei per token. Multipliers are
basis points (10_000 = x1). Times on the wire are whole milliseconds or seconds since the Unix epoch, as named.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NewType

Wei = NewType("Wei", int)
Address = NewType("Address", bytes)  # 20 bytes, the last 20 of keccak256(uncompressed public key)
Digest = NewType("Digest", bytes)  # 32 bytes
JobId = NewType("JobId", bytes)  # 32 bytes: the EIP-712 digest of the JobRequest

BPS: Final = 10_000
"""One, in basis points. Every multiplier is a multiple of 1/10_000; finer steps would not change a price sheet."""

WEI_PER_TALLY: Final = 10**18

LEAF_TOKENS: Final = 32
"""Tokens a transcript leaf and a payment increment cover. Unit: tokens. The most either party can lose in a job
is one increment; doubling it halves the signatures and journal commits per token and doubles that loss."""

INCREMENT_TOKENS: Final = LEAF_TOKENS

MAX_FRAME_BYTES: Final = 64 * 1024
"""Largest frame, length prefix excluded. A leaf of 32 tokens with fingerprints is under 1 KiB sealed; prompts
above this travel as several chunks. Doubling it doubles what a stranger can make us buffer per stream."""

MAX_PROMPT_TOKENS: Final = 1 << 20
"""Bound on a prompt's length before any allocation. Unit: tokens. Above every context window sold today."""

MAX_AMOUNT: Final = (1 << 96) - 1
"""Largest amount the Escrow slot holds (uint96 wei, 7.9e10 TALLY), far above the token's hard cap."""

ZERO_DIGEST: Final = Digest(b"\0" * 32)
ZERO_ADDRESS: Final = Address(b"\0" * 20)


class Tier(IntEnum):
    """Latency tier of a job; the tariff gives each its multiplier, promises and refund."""

    FLEX = 0
    STANDARD = 1
    PRIORITY = 2


class JobKind(IntEnum):
    """What a job computes. BATCH is GENERATE without a reader waiting: flex tier, served when nothing else wants to."""

    GENERATE = 0
    EMBED = 1
    BATCH = 2


class FinishReason(IntEnum):
    """Why a stream of tokens ended. OPEN is what an interim receipt carries."""

    OPEN = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    DEADLINE = 4
    ESCROW_EXHAUSTED = 5
    ERROR = 6


class AuditOutcome(IntEnum):
    """What a validator found in a case.

    PASS: nothing wrong. WITHHELD: a transcript was not delivered in time. FORGED: the documents contradict the
    transcript or each other. IMPROBABLE: so many flags have a probability below 1e-9 in honest work. VOID: some token
    is far off, too few for IMPROBABLE; a larger committee looks again.
    """

    PASS = 0
    WITHHELD = 1
    FORGED = 2
    IMPROBABLE = 3
    VOID = 4


class Verifiability(IntEnum):
    """What a provider's output can be checked by (DESIGN: verification)."""

    NONE = 0
    LOGPROB = 1
    REPLAY = 2
