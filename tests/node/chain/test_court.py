"""The Court port's contract, on the twin and on the contract itself."""

from __future__ import annotations

import pytest

from incentives.audit_draw import is_forced
from node.chain.errors import ContractReverted
from node.ports import CaseState, ChainUnavailable
from protocol.eip712 import digest, hash_struct
from protocol.units import WEI_PER_TALLY, ZERO_DIGEST, AuditOutcome, Digest
from tests.node.chain.court_bench import GAPS, OTHER_GAPS, PROFILE, STAKE, CourtBench, entries, verdict
from tests.twins.chain_lab import CourtLab
from tests.twins.engine_twin import profile


async def refused(name: str, call: object) -> ContractReverted:
    """That a call reverts with the error `name`."""
    with pytest.raises(ContractReverted) as caught:
        await call  # type: ignore[misc]
    assert caught.value.name == name, str(caught.value)
    return caught.value


async def test_rules_are_read_and_a_profile_is_registered_once(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=0)
    rules = await bench.court.rules()
    assert rules.committees == (3, 4, 5) and rules.epoch_seconds > 0 and rules.submit_window > 0
    assert await bench.court.profile_registered(hash_struct(PROFILE))
    assert not await bench.court.profile_registered(hash_struct(profile(b"another")))
    await bench.court.register_profile(PROFILE)
    assert await bench.court.now() >= await bench.timestamp()
    assert await bench.court.evidence(bench.provider.address) == 10**18, "1 before the first case"


async def test_validators_enlist_with_stake_and_a_key_and_retire(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=2)
    first, second = bench.validators
    assert set(await bench.court.validators()) == {first.address, second.address}
    await refused("AlreadyEnlisted", first.court.enlist())
    stranger = await court_lab.account()
    node = await court_lab.node(stranger)
    await refused("NotRegistered", court_lab.court(node).enlist())
    await first.court.retire()
    assert await bench.court.validators() == (second.address,)
    await refused("NotEnlisted", first.court.retire())


async def test_a_commitment_is_made_once_after_its_epoch_by_its_provider_s_key(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=0)
    epoch = await bench.timestamp() // bench.rules.epoch_seconds
    key = await bench.commit(epoch)
    record = await bench.court.commitment(key)
    assert record is not None
    assert (record.provider, record.epoch, record.count, record.total) == (bench.provider.address, epoch, 3, 3_000)
    assert record.profile_id == hash_struct(PROFILE) and record.beacon == ZERO_DIGEST and record.earlier == 0
    assert await bench.court.commitment(Digest(b"\x01" * 32)) is None
    await refused("AlreadyCommitted", bench.commit(epoch))
    later = await bench.commit()
    record = await bench.court.commitment(later)
    assert record is not None and record.earlier == 3
    events, following = await bench.court.events(0)
    made = [event for event in events if event.name == "Committed"]
    assert [event.case_id for event in made] == [key, later]
    assert made[0].about == bench.provider.address and made[0].values["count"] == 3
    assert (await bench.court.events(following))[0] == []


async def test_a_draw_waits_for_its_beacon_and_seats_a_committee(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open()
    key = await bench.commit()
    await refused("TooEarlyToDraw", bench.court.draw(key))
    await refused("UnknownCommitment", bench.court.draw(Digest(b"\x01" * 32)))
    assert await bench.court.case(key) is None
    await court_lab.mine(2)
    await bench.court.draw(key)
    case = await bench.case(key)
    assert (case.state, case.round, case.provider) == (CaseState.SUBMIT, 0, bench.provider.address)
    assert len(case.members) == 3 and {m.validator for m in case.members} <= {v.address for v in bench.validators}
    assert all(m.submitted == ZERO_DIGEST and m.verdict is None for m in case.members)
    assert case.until == await bench.timestamp() + bench.rules.submit_window
    record = await bench.court.commitment(key)
    assert record is not None and record.beacon != ZERO_DIGEST
    await refused("AlreadyDrawn", bench.court.draw(key))


async def test_two_validators_are_no_committee(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=2)
    key = await bench.commit()
    await court_lab.mine(2)
    await refused("NotEnoughValidators", bench.court.draw(key))


async def test_verdicts_are_committed_to_before_any_is_seen(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open()
    key = await bench.drawn()
    members = await bench.members(key)
    outsider = next(player for player in bench.validators if player not in members)
    found = [verdict(player, key, AuditOutcome.PASS) for player in members]
    digests = [digest(bench.court.domain, item) for item in found]
    await refused("NotAMember", outsider.court.submit(key, digests[0]))
    await members[0].court.submit(key, digests[0])
    await refused("AlreadySubmitted", members[0].court.submit(key, digests[0]))
    await refused("WrongPhase", members[0].court.reveal(found[0]))
    for player, named in zip(members[1:], digests[1:], strict=True):
        await player.court.submit(key, named)
    case = await bench.case(key)
    assert case.state is CaseState.REVEAL, "all have submitted"
    assert [member.submitted for member in case.members] == digests
    other = verdict(members[0], key, AuditOutcome.FORGED)
    await refused("NotWhatWasSubmitted", members[0].court.reveal(other))
    await refused("WrongPhase", bench.court.conclude(key))
    for player, item in zip(members, found, strict=True):
        await player.court.reveal(item)
    assert [member.verdict for member in (await bench.case(key)).members] == found
    await bench.court.conclude(key)
    case = await bench.case(key)
    assert (case.state, case.outcome, case.slashed) == (CaseState.CLOSED, AuditOutcome.PASS, 0)
    assert all(member.credited for member in case.members)
    assert await bench.court.credits(members[0].address) == (64, 0)
    assert await bench.provider.stake() == STAKE


async def test_a_verdict_that_contradicts_its_own_numbers_is_not_taken(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open()
    key = await bench.drawn()
    members = await bench.members(key)
    lies = [verdict(player, key, AuditOutcome.PASS, flags=30, worst_flags=30) for player in members]
    for player, item in zip(members, lies, strict=True):
        await player.court.submit(key, digest(bench.court.domain, item))
    await refused("ContradictsItself", members[0].court.reveal(lies[0]))


async def test_the_guilty_are_slashed_after_the_answer_window(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open()
    key = await bench.drawn()
    case = await bench.judge(key, AuditOutcome.IMPROBABLE)
    assert (case.state, case.outcome) == (CaseState.ANSWER, AuditOutcome.IMPROBABLE)
    await refused("WrongPhase", bench.court.execute(key))
    await refused("NotForced", bench.court.answer(key, b"\x07" * 32))
    await bench.until(case.until)
    member = (await bench.members(key))[0]
    before = await member.node.token_balance(member.address)
    await bench.validators[0].court.execute(key)
    case = await bench.case(key)
    assert (case.state, case.slashed) == (CaseState.CLOSED, STAKE)
    assert await bench.provider.stake() == 0
    bounty = STAKE // 10
    assert await member.node.token_balance(member.address) == before + bounty // 2 // 3
    await refused("WrongPhase", bench.court.execute(key))


async def test_what_is_withheld_costs_a_tenth(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open()
    key = await bench.drawn()
    case = await bench.judge(key, AuditOutcome.WITHHELD, tokens=0, worst_tokens=0, gaps=ZERO_DIGEST)
    await bench.until(case.until)
    await bench.court.execute(key)
    assert (await bench.case(key)).slashed == STAKE // 10
    assert await bench.provider.stake() == STAKE - STAKE // 10


async def test_a_liar_who_measured_nothing_is_penalised_and_a_silent_member_is_counted(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=3)
    key = await bench.drawn()
    members = await bench.members(key)
    honest = [verdict(player, key, AuditOutcome.IMPROBABLE) for player in members[:2]]
    await bench.vote(key, [*honest, verdict(members[2], key, AuditOutcome.PASS, gaps=OTHER_GAPS)])
    await bench.court.conclude(key)
    case = await bench.case(key)
    assert (case.state, case.round) == (CaseState.SUBMIT, 1), "two of three are no quorum"
    case = await bench.judge(key, AuditOutcome.IMPROBABLE)
    await bench.until(case.until)
    await bench.court.execute(key)
    assert await members[2].stake() == STAKE - bench.rules.validator_penalty
    assert await members[0].stake() == STAKE


async def test_a_round_of_silence_leads_to_the_next_and_at_last_to_none(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=3)
    key = await bench.drawn()
    for round_ in range(3):
        case = await bench.case(key)
        assert case.round == round_
        await bench.until(case.until + (0 if case.state is CaseState.REVEAL else bench.rules.reveal_window))
        await bench.court.conclude(key)
    case = await bench.case(key)
    assert (case.state, case.slashed) == (CaseState.UNDECIDED, 0)
    assert [(await bench.court.credits(player.address))[1] for player in bench.validators] == [3, 3, 3]


async def test_the_accused_may_appeal_for_a_bond(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=4)
    key = await bench.drawn()
    await bench.judge(key, AuditOutcome.IMPROBABLE)
    await refused("NotTheAccused", bench.validators[0].court.appeal(key))
    before = await bench.provider.node.token_balance(bench.provider.address)
    await bench.court.appeal(key)
    bond = bench.rules.appeal_bond
    assert await bench.provider.node.token_balance(bench.provider.address) == before - bond
    case = await bench.case(key)
    assert (case.state, case.round, len(case.members)) == (CaseState.SUBMIT, 1, 4)
    case = await bench.judge(key, AuditOutcome.PASS)
    assert (case.state, case.outcome) == (CaseState.CLOSED, AuditOutcome.PASS)
    assert await bench.provider.node.token_balance(bench.provider.address) == before
    assert await bench.provider.stake() == STAKE


async def test_an_error_that_was_due_is_answered_with_the_secret(forced_lab: CourtLab) -> None:
    bench = await CourtBench(forced_lab).open()
    secret = b"\x01".rjust(32, b"\0")
    first = await bench.drawn(secret=secret)
    await bench.judge(first, AuditOutcome.PASS)
    record = await bench.court.commitment(first)
    assert record is not None and is_forced(secret, record.beacon, bench.rules.forced_bps)
    key = await bench.drawn(jobs=entries(2, b"more"))
    members = await bench.members(key)
    stamp = verdict(members[0], key, AuditOutcome.PASS, gaps=OTHER_GAPS)
    await bench.vote(key, [stamp, *(verdict(player, key, AuditOutcome.IMPROBABLE) for player in members[1:])])
    await bench.court.conclude(key)
    case = await bench.judge(key, AuditOutcome.IMPROBABLE)
    assert case.state is CaseState.ANSWER
    await bench.court.answer(key, secret)
    case = await bench.case(key)
    assert (case.state, case.was_forced, case.slashed) == (CaseState.CLOSED, True, 0)
    assert await bench.provider.stake() == STAKE
    assert await members[0].stake() == STAKE - bench.rules.validator_penalty, "a rubber stamp"


async def test_events_and_reads_wait_for_an_rpc_that_answers(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=0)
    await court_lab.freeze()
    try:
        with pytest.raises(ChainUnavailable):
            await bench.court.events(0)
    finally:
        await court_lab.thaw()
    assert (await bench.court.events(0))[0]


async def test_a_commitment_that_a_reorganisation_moves_is_seen_again(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=0)
    key = await bench.commit()
    events, following = await bench.court.events(0)
    assert [event.case_id for event in events if event.name == "Committed"] == [key]
    await court_lab.reorg(2)
    assert await bench.court.commitment(key) is None
    again = await bench.commit()
    await court_lab.mine(1)
    events, _ = await bench.court.events(following)
    assert again in [event.case_id for event in events if event.name == "Committed"]


def test_gaps_of_the_bench_are_apart() -> None:
    assert GAPS != OTHER_GAPS and STAKE > 100 * WEI_PER_TALLY
