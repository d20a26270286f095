"""What a validator's conduct brings it: credit and penalties over many cases, by the committee's own rules.

Pure: cases, draws and measurements follow from a seed. A case is innocent, guilty, or guilty because an error was
forced; who runs the model measures gaps that differ by a kernel's noise, who does not has to guess them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from incentives.audit_draw import GAPS, pack_gaps
from incentives.committee import CaseState, Vote, credits_of, decide, draw_committee, penalised
from incentives.evidence import Evidence
from protocol.units import Address, AuditOutcome, Digest

SIZES: Final = (3, 7, 21)
FLAG_PPM: Final = 1_000
TOKENS: Final = 2_000
"""Output tokens a case audits. Unit: tokens."""

GUILTY_SHARE: Final = 0.05
FORCED_SHARE: Final = 0.02
NOISE_MILLI: Final = 20
"""How far two honest measurements of a gap lie apart. Unit: thousandths of a logit; bf16 kernels stay below it."""

GAP_MEAN_MILLI: Final = 1_500
"""Mean of the gaps between best and second score. Unit: thousandths of a logit. About the demo model's at T = 0.8."""


POOL: Final = 12
"""Validators enlisted: enough that the second committee has only fresh members."""

Said = tuple[AuditOutcome, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Case:
    """What is true of one case. `gaps`: as an ideal machine would measure them."""

    outcome: AuditOutcome
    forced: bool
    gaps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conduct:
    """How a validator votes: None where it has no verdict that it could reveal. `bad`: how many of the POOL do so."""

    name: str
    vote: Callable[[Case, random.Random], Said | None]
    bad: int


def _measured(case: Case, rng: random.Random) -> list[int]:
    return [gap + rng.randint(-NOISE_MILLI, NOISE_MILLI) for gap in case.gaps]


def _guessed(rng: random.Random) -> list[int]:
    """Gaps by somebody who knows how they are distributed and nothing of the work."""
    return [round(rng.expovariate(1 / GAP_MEAN_MILLI)) for _ in range(GAPS)]


def _honest(case: Case, rng: random.Random) -> Said | None:
    return case.outcome, _measured(case, rng)


def _copies(_: Case, __: random.Random) -> Said | None:
    """Submits the digest of another, which it cannot open: the salt and the other's address are in it."""
    return None


def _rubber_stamps(_: Case, rng: random.Random) -> Said | None:
    return AuditOutcome.PASS, _guessed(rng)


def _no_model(_: Case, rng: random.Random) -> Said | None:
    return rng.choice((AuditOutcome.PASS, AuditOutcome.IMPROBABLE)), _guessed(rng)


def _colludes(case: Case, rng: random.Random) -> Said | None:
    """Runs the model and says the opposite of what is true, to free a friend or to harm a rival."""
    guilty = case.outcome is AuditOutcome.IMPROBABLE
    return AuditOutcome.PASS if guilty else AuditOutcome.IMPROBABLE, _measured(case, rng)


CONDUCTS: Final = (
    Conduct("honest", _honest, 1),
    Conduct("copies", _copies, 1),
    Conduct("rubber-stamps", _rubber_stamps, 1),
    Conduct("no-model", _no_model, 1),
    Conduct("colludes, 1 of 3", _colludes, 1),
    Conduct("colludes, 2 of 7", _colludes, 2),
)


def _vote(who: Address, outcome: AuditOutcome, gaps: Sequence[int]) -> Vote:
    guilty = outcome is AuditOutcome.IMPROBABLE
    return Vote(who, outcome, TOKENS, TOKENS // 4 if guilty else 0, TOKENS // 20 if guilty else 0, pack_gaps(gaps))


@dataclass(slots=True)
class _Sum:
    seats: dict[bool, int]
    credited: dict[bool, int]
    penalties: dict[bool, int]
    acquitted: int = 0
    condemned: int = 0
    undecided: int = 0
    rounds: int = 0


def _play(conduct: Conduct, case: Case, beacon: Digest, rng: random.Random, into: _Sum) -> None:
    """One case from its first committee to its end."""
    wallets = [Address(index.to_bytes(20, "big")) for index in range(1, POOL + 1)]
    bad = frozenset(wallets[: conduct.bad])
    votes: list[Vote] = []
    before: list[Address] = []
    for round_, size in enumerate(SIZES):
        members = draw_committee(beacon, round_, wallets, size, before)
        before += members
        votes_now = []
        for member in members:
            into.seats[member in bad] += 1
            said = conduct.vote(case, rng) if member in bad else (case.outcome, _measured(case, rng))
            if said is not None:
                votes_now.append(_vote(member, *said))
        votes += votes_now
        decision = decide(len(members), votes_now, round_ == len(SIZES) - 1, Evidence(), FLAG_PPM)
        into.rounds += 1
        if decision.state is not CaseState.SUBMIT:
            break
    for who, tokens in credits_of(decision, votes_now).items():
        into.credited[who in bad] += tokens
    for who in penalised(decision, case.forced, votes):
        into.penalties[who in bad] += 1
    guilty = case.outcome is AuditOutcome.IMPROBABLE
    into.undecided += decision.state is CaseState.UNDECIDED
    into.acquitted += guilty and decision.state is CaseState.CLOSED
    into.condemned += not guilty and decision.state is CaseState.ANSWER


def play(conduct: Conduct, seed: int, cases: int) -> dict[str, Any]:
    """`cases` cases under one seed: credit a seat as a share of an honest member's, penalties, and wrong endings."""
    rng = random.Random(f"{conduct.name} {seed}")
    total = _Sum({True: 0, False: 0}, {True: 0, False: 0}, {True: 0, False: 0})
    for number in range(cases):
        lot = rng.random()
        forced = lot < FORCED_SHARE
        guilty = forced or lot < FORCED_SHARE + GUILTY_SHARE
        case = Case(AuditOutcome.IMPROBABLE if guilty else AuditOutcome.PASS, forced, tuple(_guessed(rng)))
        beacon = Digest(hashlib.sha256(f"{conduct.name} {seed} {number}".encode()).digest())
        _play(conduct, case, beacon, rng, total)
    share = {side: total.credited[side] / max(1, total.seats[side] * TOKENS) for side in (True, False)}
    return {
        "seats": total.seats[True],
        "credited_share": share[True],
        "honest_credited_share": share[False],
        "penalties": total.penalties[True],
        "honest_penalties": total.penalties[False],
        "guilty_acquitted": total.acquitted,
        "innocent_condemned": total.condemned,
        "undecided": total.undecided,
        "rounds_a_case": total.rounds / cases,
    }


def measure_conduct(seeds: int, cases: int) -> dict[str, Any]:
    """Conduct -> sums and means over the seeds."""
    result: dict[str, Any] = {}
    for conduct in CONDUCTS:
        runs = [play(conduct, seed, cases) for seed in range(seeds)]
        means = {"credited_share", "honest_credited_share", "rounds_a_case"}
        result[conduct.name] = {
            "cases": seeds * cases,
            **{key: round(sum(run[key] for run in runs) / (seeds if key in means else 1), 4) for key in runs[0]},
        }
    return result
