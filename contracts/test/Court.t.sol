// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ICourt} from "../src/ICourt.sol";
import {Entry, SumNode} from "../src/SumTree.sol";
import {Commitment, JobRequest, Verdict, WorkReceipt} from "../src/Types.sol";
import {CourtFixture} from "./CourtFixture.sol";
import {vm} from "./Vm.sol";

/// @notice A case on its ways through the rounds, and who pays for what.
contract CourtTest is CourtFixture {
    uint256 private constant OPEN = uint256(ICourt.CaseState.SUBMIT);
    uint256 private constant ANSWER = uint256(ICourt.CaseState.ANSWER);
    uint256 private constant CLOSED = uint256(ICourt.CaseState.CLOSED);

    function setUp() public {
        deploy();
    }

    function test_honestWorkPassesAndItsMembersAreCredited() external {
        bytes32 id = open(1);
        eq(members(id).length, 3, "seats");
        agree(id, ICourt.Outcome.PASS);
        eq(stateOf(id), CLOSED, "state");
        eq(stakeOf(PROVIDER), STAKE, "stake");
        isTrue(court.evidenceOf(PROVIDER) < 1e18, "honest tokens speak for the provider");
        ICourt.Seat[] memory seats = court.seatsOf(id, 0);
        for (uint256 i; i < 3; ++i) {
            (uint128 tokens, uint128 missed) = court.creditsOf(seats[i].validator);
            eq(tokens, 1_000, "tokens");
            eq(missed, 0, "missed");
            eq(uint256(seats[i].status), uint256(ICourt.SeatStatus.CREDITED), "credited");
            eq(stakeOf(seats[i].validator), VALIDATOR_STAKE, "stake");
        }
    }

    function test_improbableWorkCostsTheWholeStakeUnbondingIncluded() external {
        vm.prank(PROVIDER);
        registry.requestUnbond(4_000);
        bytes32 id = open(1);
        agree(id, ICourt.Outcome.IMPROBABLE);
        eq(stateOf(id), ANSWER, "state");
        vm.expectRevert(wrongPhase(ICourt.CaseState.ANSWER, block.timestamp + 15));
        court.execute(id);
        uint256 supply = token.totalSupply();
        vm.warp(block.timestamp + 15);
        vm.expectEmit();
        emit ICourt.Executed(id, PROVIDER, ICourt.Outcome.IMPROBABLE, STAKE);
        court.execute(id);
        eq(stakeOf(PROVIDER), 0, "stake");
        eq(token.balanceOf(members(id)[0]), 166, "a third of half the bounty");
        eq(token.balanceOf(address(court)), 500, "the payers' pool");
        eq(supply - token.totalSupply(), STAKE - 500 - 3 * 166, "burned");
        eq(court.evidenceOf(PROVIDER), 1e18, "evidence begins again");
        vm.expectRevert(wrongPhase(ICourt.CaseState.CLOSED, block.timestamp + 90 days));
        court.execute(id);
    }

    function test_withholdingCostsATenthAndIsNoEvidence() external {
        bytes32 id = open(1);
        agree(id, ICourt.Outcome.WITHHELD);
        vm.warp(block.timestamp + 15);
        court.execute(id);
        eq(stakeOf(PROVIDER), STAKE - STAKE / 10, "stake");
        eq(court.evidenceOf(PROVIDER), 1e18, "evidence");
    }

    function test_evidenceTurnsAPassIntoAVerdictAndItsVotersArePaid() external {
        bytes32 id = open(1);
        Verdict memory v = verdict(ICourt.Outcome.PASS);
        (v.tokens, v.flags, v.worstTokens, v.worstFlags) = (20_000, 200, 64, 2);
        round(id, v, 0, v);
        ICourt.Case memory c = court.caseOf(id);
        eq(uint256(c.state), ANSWER, "state");
        eq(uint256(c.outcome), uint256(ICourt.Outcome.IMPROBABLE), "outcome");
        eq(uint256(c.found), uint256(ICourt.Outcome.PASS), "found");
        isTrue(c.evidence >= 1e24, "evidence");
        eq(court.evidenceOf(PROVIDER), 1e18, "nothing kept before the end");
        vm.warp(block.timestamp + 15);
        court.execute(id);
        (uint128 tokens,) = court.creditsOf(members(id)[0]);
        eq(tokens, 20_000, "credited");
        eq(stakeOf(members(id)[0]), VALIDATOR_STAKE, "no penalty for what the quorum said");
    }

    function test_aLiarIsOvertakenByTheNextCommitteeAndPenalised() external {
        bytes32 id = open(1);
        Verdict memory lie = verdict(ICourt.Outcome.IMPROBABLE);
        lie.gaps = OTHER_GAPS;
        address liar = members(id)[0];
        round(id, verdict(ICourt.Outcome.PASS), 1, lie);
        eq(stateOf(id), OPEN, "next round");
        eq(members(id).length, 4, "four seats");
        agree(id, ICourt.Outcome.PASS);
        eq(stateOf(id), CLOSED, "state");
        eq(stakeOf(liar), VALIDATOR_STAKE - PENALTY, "penalty");
        eq(stakeOf(PROVIDER), STAKE, "stake");
        eq(token.balanceOf(address(court)), 0, "all of it burned");
    }

    function test_aDissenterWhoMeasuredIsNotPenalised() external {
        bytes32 id = open(1);
        address dissenter = members(id)[0];
        round(id, verdict(ICourt.Outcome.PASS), 1, verdict(ICourt.Outcome.IMPROBABLE));
        agree(id, ICourt.Outcome.PASS);
        eq(stakeOf(dissenter), VALIDATOR_STAKE, "stake");
    }

    function test_aRubberStampIsPenalisedWhereTheQuorumFoundACheat() external {
        bytes32 id = open(1);
        Verdict memory stamp = verdict(ICourt.Outcome.PASS);
        stamp.gaps = OTHER_GAPS;
        address stamper = members(id)[0];
        round(id, verdict(ICourt.Outcome.IMPROBABLE), 1, stamp);
        agree(id, ICourt.Outcome.IMPROBABLE);
        vm.warp(block.timestamp + 15);
        court.execute(id);
        eq(stakeOf(stamper), VALIDATOR_STAKE - PENALTY, "penalty");
        eq(stakeOf(PROVIDER), 0, "slashed");
    }

    function test_whoCopiesGapsWronglyEarnsNoCredit() external {
        bytes32 id = open(1);
        Verdict memory guess = verdict(ICourt.Outcome.PASS);
        guess.gaps = OTHER_GAPS;
        address guesser = members(id)[0];
        round(id, verdict(ICourt.Outcome.PASS), 1, guess);
        (uint128 tokens, uint128 missed) = court.creditsOf(guesser);
        eq(tokens, 0, "tokens");
        eq(missed, 0, "missed");
        eq(stakeOf(guesser), VALIDATOR_STAKE, "not punished for agreeing");
    }

    function test_voidLooksAgainAndClosesUnpunishedInTheLastRound() external {
        bytes32 id = open(1);
        agree(id, ICourt.Outcome.VOID);
        agree(id, ICourt.Outcome.VOID);
        eq(court.evidenceOf(PROVIDER), 1e18, "no evidence before the last round");
        agree(id, ICourt.Outcome.VOID);
        eq(stateOf(id), CLOSED, "state");
        eq(stakeOf(PROVIDER), STAKE, "stake");
        isTrue(court.evidenceOf(PROVIDER) > 1e18, "evidence");
    }

    function test_withoutAQuorumNobodyIsPunished() external {
        bytes32 id = open(1);
        for (uint256 i; i < 3; ++i) {
            uint256 half = members(id).length / 2;
            round(id, verdict(ICourt.Outcome.PASS), half, verdict(ICourt.Outcome.IMPROBABLE));
        }
        eq(stateOf(id), uint256(ICourt.CaseState.UNDECIDED), "state");
        eq(stakeOf(PROVIDER), STAKE, "stake");
        eq(court.evidenceOf(PROVIDER), 1e18, "evidence");
    }

    function test_laterCommitteesAreNewPeopleWhenEnoughAreLeft() external {
        bytes32 id = open(1);
        address[] memory first = members(id);
        agree(id, ICourt.Outcome.VOID);
        address[] memory second = members(id);
        for (uint256 i; i < first.length; ++i) {
            for (uint256 j; j < second.length; ++j) {
                isTrue(first[i] != second[j], "seated twice");
            }
        }
    }

    function test_windowsEndWithoutATransactionAndTheAbsentAreCounted() external {
        bytes32 id = open(1);
        uint256 until = court.caseOf(id).until;
        address[] memory who = members(id);
        submit(id, who[0], verdict(ICourt.Outcome.PASS));
        submit(id, who[1], verdict(ICourt.Outcome.PASS));
        refuseReveal(id, who[0], wrongPhase(ICourt.CaseState.SUBMIT, until));
        vm.warp(until);
        eq(stateOf(id), uint256(ICourt.CaseState.REVEAL), "the window is over");
        vm.expectRevert(wrongPhase(ICourt.CaseState.REVEAL, until + 20));
        vm.prank(who[2]);
        court.submit(id, bytes32(uint256(1)));
        reveal(id, who[0], verdict(ICourt.Outcome.PASS));
        vm.expectRevert(wrongPhase(ICourt.CaseState.REVEAL, until + 20));
        court.conclude(id);
        vm.warp(until + 20);
        refuseReveal(id, who[1], wrongPhase(ICourt.CaseState.REVEAL, until + 20));
        court.conclude(id);
        eq(court.caseOf(id).round, 1, "next round");
        (, uint128 missed) = court.creditsOf(who[1]);
        eq(missed, 1, "missed");
        (, missed) = court.creditsOf(who[0]);
        eq(missed, 0, "not missed");
    }

    function test_anAppealThatClearsGivesTheBondBack() external {
        bytes32 id = open(1);
        agree(id, ICourt.Outcome.WITHHELD);
        fundBond();
        vm.prank(PROVIDER);
        court.appeal(id);
        eq(token.balanceOf(address(court)), BOND, "bond");
        eq(members(id).length, 4, "larger");
        agree(id, ICourt.Outcome.PASS);
        eq(token.balanceOf(PROVIDER), BOND, "back");
        eq(stakeOf(PROVIDER), STAKE, "stake");
    }

    function test_anAppealThatFailsBurnsTheBond() external {
        bytes32 id = open(1);
        agree(id, ICourt.Outcome.FORGED);
        fundBond();
        vm.prank(PROVIDER);
        court.appeal(id);
        agree(id, ICourt.Outcome.FORGED);
        vm.warp(block.timestamp + 15);
        court.execute(id);
        eq(stakeOf(PROVIDER), 0, "stake");
        eq(token.balanceOf(address(court)), court.caseOf(id).pool, "only the pool is left");
        eq(token.balanceOf(PROVIDER), 0, "bond");
    }

    function test_appealsAreTheAccusedsAndEndWithTheLastRound() external {
        bytes32 id = open(1);
        agree(id, ICourt.Outcome.FORGED);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotTheAccused.selector, CLIENT, PROVIDER));
        vm.prank(CLIENT);
        court.appeal(id);
        for (uint256 i; i < 2; ++i) {
            fundBond();
            vm.prank(PROVIDER);
            court.appeal(id);
            agree(id, ICourt.Outcome.FORGED);
        }
        vm.expectRevert(abi.encodeWithSelector(ICourt.NoFurtherRound.selector, 2));
        vm.prank(PROVIDER);
        court.appeal(id);
        vm.warp(court.caseOf(id).until);
        vm.expectRevert(wrongPhase(ICourt.CaseState.ANSWER, block.timestamp));
        vm.prank(PROVIDER);
        court.appeal(id);
    }

    function test_aForcedErrorIsExcused() external {
        bytes32 first = open(1);
        agree(first, ICourt.Outcome.PASS);
        uint256 before = court.evidenceOf(PROVIDER);
        bytes32 id = open(2);
        agree(id, ICourt.Outcome.IMPROBABLE);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotForced.selector));
        vm.prank(PROVIDER);
        court.answer(id, keccak256("another secret"));
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotTheAccused.selector, CLIENT, PROVIDER));
        vm.prank(CLIENT);
        court.answer(id, SECRET);
        vm.prank(PROVIDER);
        court.answer(id, SECRET);
        ICourt.Case memory c = court.caseOf(id);
        isTrue(c.wasForced, "was forced");
        eq(uint256(c.state), CLOSED, "state");
        eq(stakeOf(PROVIDER), STAKE, "stake");
        eq(court.evidenceOf(PROVIDER), before, "no evidence of it");
        (uint128 tokens,) = court.creditsOf(members(id)[0]);
        isTrue(tokens >= 1_000, "who found it is credited");
    }

    function test_forcedErrorsExcuseTokensOnlyAndNeverTheFirst() external {
        bytes32 id = open(1);
        agree(id, ICourt.Outcome.IMPROBABLE);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotForced.selector));
        vm.prank(PROVIDER);
        court.answer(id, SECRET);
        bytes32 next = open(2);
        agree(next, ICourt.Outcome.FORGED);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotForced.selector));
        vm.prank(PROVIDER);
        court.answer(next, SECRET);
    }

    function test_payersGetTheirShareByTheTreeOnce() external {
        bytes32 id = open(1);
        (WorkReceipt memory a, WorkReceipt memory b, Entry memory x, Entry memory y) = jobs();
        (, SumNode memory left, SumNode memory right) = tree(x, y);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NothingToPay.selector));
        court.compensate(id, x, 0, one(right), a);
        agree(id, ICourt.Outcome.WITHHELD);
        vm.warp(block.timestamp + 15);
        court.execute(id);
        eq(court.caseOf(id).pool, 50, "pool");
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotInTheTree.selector));
        court.compensate(id, x, 1, one(right), a);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotInTheTree.selector));
        court.compensate(id, x, 0, one(right), b);
        uint256 before = token.balanceOf(CLIENT);
        court.compensate(id, x, 0, one(right), a);
        eq(token.balanceOf(CLIENT) - before, 15, "50 * 30 / 100");
        vm.expectRevert(abi.encodeWithSelector(ICourt.AlreadyCompensated.selector, 0));
        court.compensate(id, x, 0, one(right), a);
        vm.expectRevert(wrongPhase(ICourt.CaseState.CLOSED, block.timestamp + 90 days));
        court.burnRest(id);
        vm.warp(block.timestamp + 90 days);
        court.burnRest(id);
        eq(token.balanceOf(address(court)), 0, "burned");
        vm.expectRevert(abi.encodeWithSelector(ICourt.NothingToPay.selector));
        court.compensate(id, y, 1, one(left), b);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NothingToPay.selector));
        court.burnRest(id);
    }

    function test_noPayerGetsMoreThanItPaid() external {
        bytes32 id = open(1);
        agree(id, ICourt.Outcome.IMPROBABLE);
        vm.warp(block.timestamp + 15);
        court.execute(id);
        (WorkReceipt memory a,, Entry memory x, Entry memory y) = jobs();
        (,, SumNode memory right) = tree(x, y);
        uint256 before = token.balanceOf(CLIENT);
        court.compensate(id, x, 0, one(right), a);
        eq(token.balanceOf(CLIENT) - before, 30, "30 paid, 150 would be its share");
    }

    function test_aJobWithoutAChannelHasNoPayer() external {
        WorkReceipt memory stray = receiptOf(bytes32(uint256(1)), 30);
        stray.client = address(0xDEAD);
        (, WorkReceipt memory b,, Entry memory y) = jobs();
        Entry memory x = entryOf(stray);
        (SumNode memory root, SumNode memory left, SumNode memory right) = tree(x, y);
        Commitment memory c = commitmentOf(1);
        (c.root, c.total) = (root.hash, root.total);
        bytes32 id = post(c);
        vm.roll(block.number + 2);
        court.draw(id);
        agree(id, ICourt.Outcome.WITHHELD);
        vm.warp(block.timestamp + 15);
        court.execute(id);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NoPayer.selector, address(0xDEAD)));
        court.compensate(id, x, 0, one(right), stray);
        court.compensate(id, y, 1, one(left), b);
    }

    function test_C4_whoPaysForAJobIsStruckFromItsCase() external {
        JobRequest memory own = requestBy(0x7777);
        (,,, Entry memory y) = jobs();
        (SumNode memory root,, SumNode memory right) = tree(entryOf(own), y);
        Commitment memory c = commitmentOf(1);
        (c.root, c.total) = (root.hash, root.total);
        bytes32 id = post(c);
        vm.roll(block.number + 2);
        court.draw(id);
        address[] memory who = members(id);
        strike(id, own, right, who[0], abi.encodeWithSelector(ICourt.NotItsOwnCase.selector, who[0], address(0)));
        openChannel(who[0], 0x7777);
        strike(id, own, right, who[1], abi.encodeWithSelector(ICourt.NotItsOwnCase.selector, who[1], who[0]));
        submit(id, who[0], verdict(ICourt.Outcome.PASS));
        strike(id, own, right, who[0], "");
        strike(id, own, right, who[0], abi.encodeWithSelector(ICourt.AlreadyRevealed.selector, who[0]));
        submit(id, who[1], verdict(ICourt.Outcome.PASS));
        submit(id, who[2], verdict(ICourt.Outcome.PASS));
        refuseReveal(id, who[0], abi.encodeWithSelector(ICourt.AlreadyRevealed.selector, who[0]));
        reveal(id, who[1], verdict(ICourt.Outcome.PASS));
        reveal(id, who[2], verdict(ICourt.Outcome.PASS));
        court.conclude(id);
        eq(court.caseOf(id).round, 1, "two of three are no quorum");
        (, uint128 missed) = court.creditsOf(who[0]);
        eq(missed, 0, "not missed");
    }

    function strike(bytes32 id, JobRequest memory request, SumNode memory sibling, address member, bytes memory refusal)
        private
    {
        Entry memory entry = entryOf(request);
        SumNode[] memory siblings = one(sibling);
        bytes memory sig = signature(0x7777, entry.jobId);
        if (refusal.length != 0) vm.expectRevert(refusal);
        court.disqualify(id, entry, 0, siblings, request, sig, member);
    }

    function refuseReveal(bytes32 id, address member, bytes memory refusal) private {
        Verdict memory v = fitted(verdict(ICourt.Outcome.PASS), id, member);
        vm.expectRevert(refusal);
        vm.prank(member);
        court.reveal(v);
    }

    function fundBond() private {
        require(token.transfer(PROVIDER, BOND));
        vm.prank(PROVIDER);
        token.approve(address(court), BOND);
    }

    function wrongPhase(ICourt.CaseState state, uint256 until) private pure returns (bytes memory) {
        return abi.encodeWithSelector(ICourt.WrongPhase.selector, state, until);
    }
}
