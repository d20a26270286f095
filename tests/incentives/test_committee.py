"""Committees: who is drawn, what a quorum decides, and that neither liars nor the lazy decide for the others."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.audit_draw import GAP_TOLERANCE_MILLI, GAPS, pack_gaps
from incentives.committee import (
    CaseFacts,
    CaseState,
    Decision,
    NotEnoughValidators,
    Seat,
    Step,
    Vote,
    credits_of,
    decide,
    draw_committee,
    next_step,
    penalised,
    quorum,
)
from incentives.evidence import SLASH_AT, Evidence
from protocol.units import Address, AuditOutcome, Digest
from tests.protocol.sheets import ON_SLOW_CPU

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "audit.json").read_text())
BEACON = Digest(bytes.fromhex(VECTORS["beacon"]))
PPM = 1_000
TRUE_GAPS = tuple(300 * number for number in range(GAPS))
NO_GAPS = pack_gaps([])
PASS, IMPROBABLE, VOID = AuditOutcome.PASS, AuditOutcome.IMPROBABLE, AuditOutcome.VOID


def wallet(number: int) -> Address:
    return Address(number.to_bytes(20, "big"))


def honest(number: int, outcome: AuditOutcome = PASS, chance: random.Random | None = None) -> Vote:
    """A member that ran the model: its gaps are the true ones and its own noise."""
    noise = [chance.randint(-GAP_TOLERANCE_MILLI // 2, GAP_TOLERANCE_MILLI // 2) if chance else 0 for _ in TRUE_GAPS]
    gaps = pack_gaps([gap + off for gap, off in zip(TRUE_GAPS, noise, strict=True)])
    flags = {PASS: 0, VOID: 1, IMPROBABLE: 40}.get(outcome, 0)
    return Vote(wallet(number), outcome, 640, flags, flags if outcome is not PASS else 0, gaps)


def idle(number: int, outcome: AuditOutcome) -> Vote:
    """A member that did not look: no gaps of its own."""
    return replace(honest(number, outcome), gaps=NO_GAPS)


def settled(size: int, votes: list[Vote], *, last: bool = False) -> Decision:
    return decide(size, votes, last, Evidence(), PPM)


# --------------------------------------------------------------------------------------------------------------- draw


@pytest.mark.parametrize("case", VECTORS["committee"], ids=str)
def test_draws_are_the_vectors(case: dict[str, int | list[str]]) -> None:
    everybody = [Address(bytes.fromhex(text)) for text in VECTORS["validators"]]
    count, before = case["eligible"], case["before"]
    assert isinstance(count, int) and isinstance(before, int)
    drawn = draw_committee(BEACON, case["round"], everybody[:count], case["size"], everybody[:before])  # type: ignore[arg-type]
    assert [member.hex() for member in drawn] == case["post"]


@ON_SLOW_CPU
@given(st.binary(min_size=32, max_size=32), st.integers(0, 2), st.integers(3, 30), st.integers(3, 21), st.data())
def test_a_committee_has_its_size_each_member_once_and_nobody_else(
    beacon: bytes, round_: int, count: int, size: int, data: st.DataObject
) -> None:
    eligible = [wallet(number) for number in range(count)]
    before = data.draw(st.sets(st.sampled_from(eligible)))
    drawn = draw_committee(Digest(beacon), round_, eligible, size, before)
    assert len(drawn) == len({*drawn}) == min(size, count) and {*drawn} <= {*eligible}
    assert not before & {*drawn} or count - len(before) < size
    assert drawn == draw_committee(Digest(beacon), round_, eligible[::-1], size, before)


@ON_SLOW_CPU
@given(st.binary(min_size=32, max_size=32), st.integers(4, 20))
def test_whoever_leaves_moves_nobody_else(beacon: bytes, count: int) -> None:
    """Colluders who retire once the beacon is known cannot choose who sits: the others' order stays."""
    eligible = [wallet(number) for number in range(count)]
    whole = draw_committee(Digest(beacon), 0, eligible, count)
    for gone in eligible:
        rest = [validator for validator in eligible if validator != gone]
        assert draw_committee(Digest(beacon), 0, rest, count) == tuple(one for one in whole if one != gone)


def test_everybody_is_drawn_as_often() -> None:
    eligible = [wallet(number) for number in range(10)]
    seats = Counter(
        member for seed in range(2_000) for member in draw_committee(Digest(seed.to_bytes(32, "big")), 0, eligible, 3)
    )
    assert all(500 < seats[validator] < 700 for validator in eligible)


def test_too_few_validators_judge_nobody() -> None:
    with pytest.raises(NotEnoughValidators, match="2 validators"):
        draw_committee(BEACON, 0, [wallet(1), wallet(2)], 3)


def test_quorums_are_two_thirds_and_one() -> None:
    assert [quorum(size) for size in (3, 4, 5, 7, 21)] == [3, 3, 4, 5, 15]
    assert [[size, quorum(size)] for size in range(3, 22)] == VECTORS["quorum"]
    for size in range(3, 40):
        f = (size - 1) // 3
        assert quorum(size) == size - f > size / 2 and f < quorum(size) - f


# ------------------------------------------------------------------------------------------------------------ decision


def test_the_honest_acquit_and_condemn() -> None:
    for size in (3, 4, 7, 21):
        clear = settled(size, [honest(number) for number in range(size)])
        assert (clear.state, clear.outcome, clear.evidence.cases) == (CaseState.CLOSED, PASS, 1)
        guilty = settled(size, [honest(number, IMPROBABLE) for number in range(size)])
        assert (guilty.state, guilty.outcome) == (CaseState.ANSWER, IMPROBABLE)


@pytest.mark.parametrize(("size", "liars"), [(3, 1), (4, 1), (7, 2), (21, 6)])
@pytest.mark.parametrize("truth", [PASS, IMPROBABLE])
def test_colluders_neither_acquit_nor_condemn(size: int, liars: int, truth: AuditOutcome) -> None:
    """Whatever they all say, or if they say nothing: the outcome is the truth or no outcome."""
    votes = [honest(number, truth) for number in range(size - liars)]
    for lie in [None, *AuditOutcome]:
        lies = [] if lie is None else [idle(100 + number, lie) for number in range(liars)]
        for last in (False, True):
            decision = settled(size, votes + lies, last=last)
            assert decision.found in (truth, None)
            assert decision.state is not CaseState.ANSWER or truth is IMPROBABLE
            assert (decision.found is truth) == (size - liars + (liars if lie is truth else 0) >= quorum(size))


def test_dissent_in_the_first_round_brings_the_next_and_doubt_in_the_last_acquits() -> None:
    split = [honest(0), honest(1), idle(2, IMPROBABLE)]
    assert settled(3, split).state is CaseState.SUBMIT
    decision = settled(3, split, last=True)
    assert (decision.state, decision.outcome, decision.evidence) == (CaseState.UNDECIDED, PASS, Evidence())
    assert credits_of(settled(3, split), split) == credits_of(decision, split) == {}


def test_void_is_looked_at_again_and_counts_only_at_the_end() -> None:
    votes = [honest(number, VOID) for number in range(3)]
    first, final = settled(3, votes), settled(3, votes, last=True)
    assert (first.state, first.evidence) == (CaseState.SUBMIT, Evidence())
    assert (final.state, final.outcome, final.evidence.cases) == (CaseState.CLOSED, VOID, 1)
    assert final.evidence.value > Evidence().after(640, 0, 0, PPM).value


@pytest.mark.parametrize("outcome", [AuditOutcome.WITHHELD, AuditOutcome.FORGED])
def test_documents_and_delivery_are_no_evidence_of_tokens(outcome: AuditOutcome) -> None:
    decision = settled(3, [honest(number, outcome) for number in range(3)])
    assert (decision.state, decision.outcome, decision.evidence) == (CaseState.ANSWER, outcome, Evidence())


def test_evidence_of_many_passes_condemns() -> None:
    votes = [replace(honest(number), flags=5) for number in range(3)]
    evidence, cases = Evidence(), 0
    while (decision := decide(3, votes, False, evidence, PPM)).outcome is PASS:
        evidence, cases = decision.evidence, cases + 1
    assert 1 <= cases < 20 and evidence.value < SLASH_AT <= decision.evidence.value
    assert (decision.state, decision.outcome, decision.found) == (CaseState.ANSWER, IMPROBABLE, PASS)
    assert penalised(decision, False, votes) == ()


def test_the_medians_are_of_those_who_agree() -> None:
    votes = [replace(honest(number), tokens=100 + number, flags=number) for number in range(3)]
    decision = settled(4, [*votes, replace(idle(9, IMPROBABLE), tokens=9_999)])
    assert (decision.tokens, decision.flags, decision.gaps) == (101, 1, pack_gaps(TRUE_GAPS))


# -------------------------------------------------------------------------------------------------- credit and penalty


@pytest.mark.parametrize("size", [3, 4, 7])
def test_a_rubber_stamp_earns_nothing_and_pays_for_a_wrong_one(size: int) -> None:
    f = (size - 1) // 3
    fair = [honest(number) for number in range(size - f)] + [idle(100 + number, PASS) for number in range(f)]
    decision = settled(size, fair)
    assert set(credits_of(decision, fair)) == {wallet(number) for number in range(size - f)}
    assert penalised(decision, False, fair) == ()
    cheat = [honest(number, IMPROBABLE) for number in range(size - f)]
    cheat += [idle(100 + number, PASS) for number in range(f)]
    decision = settled(size, cheat)
    assert penalised(decision, False, cheat) == tuple(wallet(100 + number) for number in range(f))


def test_a_forced_error_convicts_those_who_stamped_it_in_any_round() -> None:
    first = [idle(0, PASS), idle(1, PASS), honest(2, IMPROBABLE)]
    assert settled(3, first).state is CaseState.SUBMIT
    second = [honest(number, IMPROBABLE) for number in range(10, 17)]
    decision = settled(7, second)
    assert penalised(decision, True, [*first, *second]) == (wallet(0), wallet(1))
    assert penalised(decision, False, [*first, *second]) == (wallet(0), wallet(1))


def test_a_copied_verdict_has_no_gaps_and_earns_nothing() -> None:
    """Verdicts are committed to before any is open, so a copy can hold guessed gaps or an earlier case's."""
    old = pack_gaps([gap + 700 for gap in TRUE_GAPS])
    for gaps in (NO_GAPS, old, pack_gaps([1_000] * GAPS)):
        votes = [honest(0), honest(1), honest(2), replace(honest(3), gaps=gaps)]
        assert wallet(3) not in credits_of(settled(4, votes), votes)


def test_the_lazy_lose_only_their_credit() -> None:
    votes = [honest(number) for number in range(3)]
    decision = settled(4, votes)
    assert decision.found is PASS and len(credits_of(decision, votes)) == 3
    assert credits_of(decision, votes)[wallet(0)] == 640
    empty = [replace(vote, tokens=0) for vote in votes]
    assert set(credits_of(settled(3, empty), empty).values()) == {1}


@ON_SLOW_CPU
@given(st.integers(0, 1 << 30), st.sampled_from([3, 4, 7, 21]), st.sampled_from([PASS, IMPROBABLE]))
def test_who_measured_within_tolerance_is_never_penalised(seed: int, size: int, found: AuditOutcome) -> None:
    """Numeric noise may divide honest members at a threshold: the minority keeps its stake, whatever was found."""
    chance = random.Random(seed)
    other = IMPROBABLE if found is PASS else PASS
    f = (size - 1) // 3
    votes = [honest(number, found, chance) for number in range(size - f)]
    votes += [honest(100 + number, other, chance) for number in range(f)]
    decision = settled(size, votes)
    assert decision.found is found and penalised(decision, False, votes) == ()
    assert set(credits_of(decision, votes)) == {vote.validator for vote in votes if vote.outcome is found}


@pytest.mark.parametrize("dissent", [AuditOutcome.WITHHELD, AuditOutcome.FORGED, VOID])
def test_other_dissent_is_never_punished(dissent: AuditOutcome) -> None:
    """A provider may serve members unequally: who was refused says so, and is right for itself."""
    votes = [honest(0), honest(1), honest(2), idle(3, dissent)]
    decision = settled(4, votes)
    assert penalised(decision, False, votes) == penalised(decision, True, votes)[3:] == ()
    refused = [idle(number, AuditOutcome.WITHHELD) for number in range(3)] + [honest(3)]
    assert penalised(settled(4, refused), False, refused) == ()


# ----------------------------------------------------------------------------------------------------------- next step


def facts(state: CaseState, *seats: tuple[bool, bool], until: int = 100, drawable: bool = True) -> CaseFacts:
    rows = tuple(Seat(wallet(number), *seat) for number, seat in enumerate(seats))
    return CaseFacts(state, until, 50, drawable, rows)


NEW, SENT, OPEN = (False, False), (True, False), (True, True)


@pytest.mark.parametrize(
    ("case", "now", "step"),
    [
        (facts(CaseState.NONE), 0, Step.DRAW),
        (facts(CaseState.NONE, drawable=False), 0, Step.WAIT),
        (facts(CaseState.SUBMIT, NEW, NEW, NEW), 99, Step.SUBMIT),
        (facts(CaseState.SUBMIT, SENT, NEW, NEW), 99, Step.WAIT),
        (facts(CaseState.SUBMIT, SENT, NEW, NEW), 100, Step.REVEAL),
        (facts(CaseState.SUBMIT, NEW, SENT, SENT), 100, Step.WAIT),
        (facts(CaseState.SUBMIT, NEW, SENT, SENT), 150, Step.CONCLUDE),
        (facts(CaseState.SUBMIT, NEW, NEW, NEW), 100, Step.CONCLUDE),
        (facts(CaseState.SUBMIT, SENT, SENT, SENT), 0, Step.REVEAL),
        (facts(CaseState.REVEAL, SENT, OPEN, NEW), 99, Step.REVEAL),
        (facts(CaseState.REVEAL, OPEN, SENT, NEW), 99, Step.WAIT),
        (facts(CaseState.REVEAL, OPEN, OPEN, NEW), 99, Step.CONCLUDE),
        (facts(CaseState.REVEAL, SENT, SENT, SENT), 100, Step.CONCLUDE),
        (facts(CaseState.ANSWER, OPEN), 99, Step.WAIT),
        (facts(CaseState.ANSWER, OPEN), 100, Step.EXECUTE),
        (facts(CaseState.CLOSED, OPEN), 0, Step.DONE),
        (facts(CaseState.UNDECIDED, OPEN), 0, Step.DONE),
    ],
)
def test_the_next_step(case: CaseFacts, now: int, step: Step) -> None:
    assert next_step(case, wallet(0), now) is step


def test_a_bystander_draws_concludes_and_executes_and_nothing_else() -> None:
    me = wallet(99)
    assert next_step(facts(CaseState.SUBMIT, NEW, NEW), me, 0) is Step.WAIT
    assert next_step(facts(CaseState.REVEAL, SENT, SENT), me, 0) is Step.WAIT
    assert next_step(facts(CaseState.REVEAL, OPEN, OPEN), me, 0) is Step.CONCLUDE


@ON_SLOW_CPU
@given(st.lists(st.sampled_from(["honest", "late", "mute"]), min_size=3, max_size=7), st.integers(0, 3))
def test_a_round_always_comes_to_its_end(kinds: list[str], waits: int) -> None:
    """Members who act on `next_step`, submit late or never reveal: the round is concluded by the end of its windows."""
    state, until, seats = CaseState.SUBMIT, 100, [NEW for _ in kinds]
    for now in range(0, 200, 10 + waits):
        for number, kind in enumerate(kinds):
            step = next_step(facts(state, *seats, until=until), wallet(number), now)
            if step is Step.CONCLUDE:
                return
            if step is Step.SUBMIT and kind != "late":
                seats[number] = SENT
            if step is Step.REVEAL and kind != "mute":
                assert seats[number] == SENT
                seats[number] = OPEN
        if state is CaseState.SUBMIT and all(sent for sent, _ in seats):
            state, until = CaseState.REVEAL, now + 50
    pytest.fail("nobody concluded the round")
