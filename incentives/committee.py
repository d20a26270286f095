"""Who judges a case, when a round of verdicts decides it, who earned credit and who only pretended to look.

The pure mirror of a case's rules in contracts/src/Court.sol: draw, quorum, decision, credits, penalties, and what a
validator does next. Committees grow by rounds; each needs 2f + 1 of its 3f + 1 seats for one outcome, so f members
who collude neither acquit nor condemn anybody, and f who stay away stop nothing (README.md of this folder).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

from eth_hash.auto import keccak

from incentives.audit_draw import gaps_match, lower_median, median_gaps
from incentives.evidence import SLASH_AT, Evidence, far_above
from protocol.errors import TallyError
from protocol.units import ZERO_DIGEST, Address, AuditOutcome, Digest

MIN_COMMITTEE: Final = 3
"""Fewest members a committee can have. With two, one liar would decide or block every case."""

FORCED_TOKENS: Final = 64
"""Output of a planted error. Unit: tokens. Doubling it doubles what a provider can cheat by while one is due."""

GUILTY: Final = frozenset({AuditOutcome.WITHHELD, AuditOutcome.FORGED, AuditOutcome.IMPROBABLE})
"""Outcomes that the accused is punished for."""

OPPOSITE: Final = {AuditOutcome.PASS: AuditOutcome.IMPROBABLE, AuditOutcome.IMPROBABLE: AuditOutcome.PASS}
"""The two outcomes that the same numbers cannot both give. Other dissent may be honest: a provider can serve members
unequally."""


class CaseState(IntEnum):
    """Where a case stands (contracts/src/ICourt.sol). NONE: nothing was drawn for that commitment yet.

    SUBMIT: members commit to verdicts. REVEAL: they open them. ANSWER: found guilty, the accused may answer or appeal.
    CLOSED: `outcome` stands and is carried out. UNDECIDED: no round reached a quorum; nobody is punished.
    """

    NONE = 0
    SUBMIT = 1
    REVEAL = 2
    ANSWER = 3
    CLOSED = 4
    UNDECIDED = 5


# --------------------------------------------------------------------------------------------------------------- draw


@dataclass
class NotEnoughValidators(TallyError):
    """Fewer validators could judge this provider than a committee needs; its case waits."""

    eligible: int

    def __str__(self) -> str:
        return f"{self.eligible} validators can judge this case, a committee needs {MIN_COMMITTEE}; it waits for more"


def draw_committee(
    beacon: Digest, round_: int, eligible: Sequence[Address], size: int, before: Iterable[Address] = ()
) -> tuple[Address, ...]:
    """The members of a round: those that rank lowest by keccak256(abi.encode(beacon, round, validator)), lowest first.

    A rank depends on nobody else: who joins or leaves after the beacon is known moves nobody's place.
    `eligible`: validators enlisted before the beacon that may judge the case. `before`: members of earlier rounds,
    left out when enough others remain. All of them when there are fewer than `size`. Raises: NotEnoughValidators.
    """
    if len(eligible) < MIN_COMMITTEE:
        raise NotEnoughValidators(len(eligible))
    seated = frozenset(before)
    fresh = [validator for validator in eligible if validator not in seated]
    pool = fresh if len(fresh) >= size else eligible
    packed = beacon + round_.to_bytes(32, "big")
    return tuple(sorted(pool, key=lambda validator: keccak(packed + validator.rjust(32, b"\0")))[:size])


def quorum(size: int) -> int:
    """Votes for one outcome that decide a committee of `size`: 3 of 3, 3 of 4, 5 of 7, 15 of 21."""
    return size - (size - 1) // 3


# ------------------------------------------------------------------------------------------------------------ decision


@dataclass(frozen=True, slots=True)
class Vote:
    """One revealed verdict, as far as it decides. `gaps`: 32 bytes (audit_draw.py)."""

    validator: Address
    outcome: AuditOutcome
    tokens: int
    flags: int
    voids: int
    gaps: Digest


@dataclass(frozen=True, slots=True)
class Decision:
    """How a round ends. `state`: SUBMIT when the next round has to look.

    `found`: the outcome a quorum agreed on, None without one; `outcome` is what follows for the provider: IMPROBABLE
    when its evidence condemns it. `tokens`, `flags`, `voids`, `gaps`: lower medians over the agreeing members.
    `evidence`: the provider's, with this case; to be kept when the case closes, unless an error was forced.
    """

    state: CaseState
    outcome: AuditOutcome
    found: AuditOutcome | None
    agreeing: tuple[Address, ...]
    tokens: int
    flags: int
    voids: int
    gaps: Digest
    evidence: Evidence


def decide(size: int, votes: Sequence[Vote], is_last: bool, evidence: Evidence, flag_ppm: int) -> Decision:
    """The end of a round of `size` seats. `votes`: the revealed ones that count.

    `is_last`: no further committee can be seated. `evidence`: the provider's before this case. Raises: FieldOutOfRange.
    """
    counts = Counter(vote.outcome for vote in votes)
    found = next((AuditOutcome(outcome) for outcome, count in counts.items() if count >= quorum(size)), None)
    if found is None:
        state = CaseState.UNDECIDED if is_last else CaseState.SUBMIT
        return Decision(state, AuditOutcome.PASS, None, (), 0, 0, 0, ZERO_DIGEST, evidence)
    agreeing = [vote for vote in votes if vote.outcome == found]
    tokens, flags, voids = (
        lower_median([getattr(vote, name) for vote in agreeing]) for name in ("tokens", "flags", "voids")
    )
    outcome, state = found, CaseState.ANSWER if found in GUILTY else CaseState.CLOSED
    if found == AuditOutcome.VOID and not is_last:
        state = CaseState.SUBMIT
    elif found not in (AuditOutcome.WITHHELD, AuditOutcome.FORGED):
        evidence = evidence.after(tokens, flags, voids, flag_ppm)
        if evidence.value >= SLASH_AT:
            outcome, state = AuditOutcome.IMPROBABLE, CaseState.ANSWER
    gaps = median_gaps([vote.gaps for vote in agreeing])
    members = tuple(vote.validator for vote in agreeing)
    return Decision(state, outcome, found, members, tokens, flags, voids, gaps, evidence)


def credits_of(decision: Decision, votes: Sequence[Vote]) -> dict[Address, int]:
    """Tokens credited per member of the deciding round: who agreed with the quorum and measured what it measured.

    The median's tokens each, at least 1: documents were looked at even where no token was.
    """
    if decision.found is None or decision.state is CaseState.SUBMIT:
        return {}
    return {
        vote.validator: max(1, decision.tokens)
        for vote in votes
        if vote.outcome == decision.found and gaps_match(vote.gaps, decision.gaps)
    }


def penalised(decision: Decision, was_forced: bool, votes: Sequence[Vote]) -> tuple[Address, ...]:
    """Members of any round who claimed the opposite of what was found and did not measure the work.

    `decision`: the round that closed the case. `votes`: of all its rounds. A forced error was there to be found, so
    then PASS is the wrong claim whatever the quorum said. Whose gaps match ran the model, and numeric noise alone
    divides it from the others: it is never punished.
    """
    found = AuditOutcome.IMPROBABLE if was_forced else decision.found
    wrong = OPPOSITE.get(found) if found is not None else None
    return tuple(vote.validator for vote in votes if vote.outcome == wrong and not gaps_match(vote.gaps, decision.gaps))


def excused_flags(tokens: int, flag_ppm: int) -> int:
    """Most flags among `tokens` that a forced error explains: those of its own tokens, and what honest work beside it
    has all but never more of. A case with more was not only forced, and is not excused."""
    return FORCED_TOKENS + far_above(tokens, flag_ppm)


# ----------------------------------------------------------------------------------------------------------- next step


class Step(Enum):
    """What a validator does about a case now."""

    WAIT = "wait"
    DRAW = "draw"
    SUBMIT = "submit"
    REVEAL = "reveal"
    CONCLUDE = "conclude"
    EXECUTE = "execute"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Seat:
    """One member of the current round."""

    validator: Address
    submitted: bool
    revealed: bool


@dataclass(frozen=True, slots=True)
class CaseFacts:
    """What decides the next step. `until`: Unix second at which the state's window ends. `reveal_window`: seconds.

    `drawable`: the commitment is old enough for its beacon. `seats`: of the current round.
    """

    state: CaseState
    until: int
    reveal_window: int
    drawable: bool
    seats: tuple[Seat, ...] = ()


def next_step(facts: CaseFacts, me: Address, now: int) -> Step:
    """The next step of validator `me` at Unix second `now`.

    DRAW, CONCLUDE and EXECUTE are open to anybody, so whoever comes first does them. SUBMIT assumes that the verdict is
    at hand by then, and REVEAL that it was journaled before its digest went out.
    """
    mine = next((seat for seat in facts.seats if seat.validator == me), None)
    is_over = now >= facts.until
    match facts.state:
        case CaseState.NONE:
            return Step.DRAW if facts.drawable else Step.WAIT
        case CaseState.SUBMIT if not is_over and not all(seat.submitted for seat in facts.seats):
            return Step.SUBMIT if mine is not None and not mine.submitted else Step.WAIT
        case CaseState.SUBMIT:
            # The window ended without a transaction: reveals count from its end.
            return _revealing(facts, mine, now >= facts.until + facts.reveal_window)
        case CaseState.REVEAL:
            return _revealing(facts, mine, is_over)
        case CaseState.ANSWER:
            return Step.EXECUTE if is_over else Step.WAIT
        case _:
            return Step.DONE


def _revealing(facts: CaseFacts, mine: Seat | None, is_over: bool) -> Step:
    if is_over or all(seat.revealed for seat in facts.seats if seat.submitted):
        return Step.CONCLUDE
    return Step.REVEAL if mine is not None and mine.submitted and not mine.revealed else Step.WAIT
