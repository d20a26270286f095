// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ICourt} from "../src/ICourt.sol";
import {IRegistry} from "../src/IRegistry.sol";
import {Entry, SumNode} from "../src/SumTree.sol";
import {Commitment, JobRequest, NodeKeyConsent, Types, Verdict, WorkReceipt} from "../src/Types.sol";
import {CourtFixture} from "./CourtFixture.sol";
import {vm} from "./Vm.sol";

/// @notice What a cheat would try: to be excused, to choose its judges, to be punished for less or not at all, to see
/// others punished twice, or to make a verdict too dear to give.
contract CourtAttacksTest is CourtFixture {
    uint8 private constant TWO_RECEIPTS = 1;
    uint8 private constant BROKEN_CHAIN = 3;

    function setUp() public {
        deploy();
    }

    function ruleSet() internal pure override returns (ICourt.Rules memory r) {
        r = super.ruleSet();
        r.committees = [3, 4, 31];
    }

    // ---------------------------------------------------------------------------------------------- forced errors

    function test_anEpochIsNotCheatedThroughOnTheExcuseOfOneForcedError() external {
        agree(open(1), ICourt.Outcome.PASS);
        bytes32 id = open(2);
        Verdict memory v = verdict(ICourt.Outcome.IMPROBABLE);
        (v.tokens, v.flags, v.worstTokens, v.worstFlags) = (1_000, 131, 64, 30);
        round(id, v, 0, v);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotForced.selector));
        vm.prank(PROVIDER);
        court.answer(id, SECRET);
    }

    function test_whatAForcedErrorExplainsIsExcused() external {
        agree(open(1), ICourt.Outcome.PASS);
        bytes32 id = open(2);
        Verdict memory v = verdict(ICourt.Outcome.IMPROBABLE);
        (v.tokens, v.flags, v.worstTokens, v.worstFlags) = (1_000, 130, 64, 64);
        round(id, v, 0, v);
        vm.prank(PROVIDER);
        court.answer(id, SECRET);
        isTrue(court.caseOf(id).wasForced, "forced");
    }

    /// @dev Every past epoch was a free lottery ticket: a job of one's own in each, until one lot forces an error.
    function test_commitmentsForEpochsLongPastDrawNoLots() external {
        agree(open(5), ICourt.Outcome.PASS);
        bytes32 ticket = open(3);
        eq(court.commitments(ticket).previous, bytes32(0), "it follows nothing");
        eq(court.commitments(ticket).earlier, 2, "its jobs are not the first");
        bytes32 next = open(6);
        eq(court.commitments(next).previous, commitmentKey(5), "and nothing follows it");
        agree(ticket, ICourt.Outcome.IMPROBABLE);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotForced.selector));
        vm.prank(PROVIDER);
        court.answer(ticket, SECRET);
    }

    // -------------------------------------------------------------------------------------------- choosing judges

    /// @dev The provider commits to a job in the name of a member's session key, which it knows from another time.
    function test_aJudgeIsNotStruckByAJobItNeverOrdered() external {
        (,,, Entry memory y) = jobs();
        JobRequest memory order = requestBy(0x7777);
        Entry memory invented = Entry(keccak256("a job"), keccak256("receipt"), 30);
        (bytes32 id, SumNode memory right) = opened(invented, y);
        address member = members(id)[0];
        openChannel(member, 0x7777);
        refuseStrike(id, invented, right, order, 0x7777, member);
        refuseStrike(id, entryOf(order), right, order, 0x7777, member);
    }

    function test_aJudgeIsNotStruckWithoutItsSignatureOrByAnOrderOfAnotherProvider() external {
        (,,, Entry memory y) = jobs();
        JobRequest memory order = requestBy(0x7777);
        (bytes32 id, SumNode memory right) = opened(entryOf(order), y);
        address member = members(id)[0];
        openChannel(member, 0x7777);
        refuseStrike(id, entryOf(order), right, order, PROVIDER_KEY, member);
        order.provider = address(0xB0B);
        vm.warp(block.timestamp + EPOCH);
        Commitment memory c = commitmentOf(2);
        SumNode memory root;
        (root,, right) = tree(entryOf(order), y);
        (c.root, c.total) = (root.hash, root.total);
        id = post(c);
        vm.roll(block.number + 2);
        court.draw(id);
        refuseStrike(id, entryOf(order), right, order, 0x7777, members(id)[0]);
    }

    function test_aCopiedDigestCannotBeOpened() external {
        bytes32 id = open(1);
        address[] memory who = members(id);
        Verdict memory v = verdict(ICourt.Outcome.PASS);
        bytes32 copied = digest(Types.hashVerdict(fitted(v, id, who[0])));
        for (uint256 i; i < 3; ++i) {
            vm.prank(who[i]);
            court.submit(id, copied);
        }
        reveal(id, who[0], v);
        Verdict memory original = fitted(v, id, who[0]);
        Verdict memory renamed = fitted(v, id, who[1]);
        bytes memory refusal = abi.encodeWithSelector(ICourt.NotWhatWasSubmitted.selector, who[1]);
        vm.expectRevert(refusal);
        vm.prank(who[1]);
        court.reveal(original);
        vm.expectRevert(refusal);
        vm.prank(who[1]);
        court.reveal(renamed);
    }

    function test_aVerdictIsNotReplayedInAnotherRoundCaseOrChain() external {
        bytes32 id = open(1);
        bytes32 other = open(2);
        Verdict memory v = verdict(ICourt.Outcome.PASS);
        address member = members(id)[0];
        submit(id, member, v);
        uint256 chain = block.chainid;
        bytes32 sealed_ = court.seatsOf(id, 0)[0].word;
        vm.chainId(chain + 1);
        isTrue(sealed_ != digest(Types.hashVerdict(fitted(v, id, member))), "another chain");
        vm.chainId(chain);
        isTrue(sealed_ != digest(Types.hashVerdict(fitted(v, other, member))), "another case");
    }

    // ---------------------------------------------------------------------------------- punished less, or never

    function test_leavingDuringTheCaseSavesNothing() external {
        bytes32 id = open(1);
        vm.prank(PROVIDER);
        registry.requestUnbond(STAKE);
        agree(id, ICourt.Outcome.FORGED);
        for (uint256 i; i < 2; ++i) {
            vm.warp(court.caseOf(id).until - 1);
            require(token.transfer(PROVIDER, BOND));
            vm.prank(PROVIDER);
            token.approve(address(court), BOND);
            vm.prank(PROVIDER);
            court.appeal(id);
            vm.warp(court.caseOf(id).until - 1);
            agree(id, ICourt.Outcome.FORGED);
        }
        vm.warp(court.caseOf(id).until);
        bytes memory bonded =
            abi.encodeWithSelector(IRegistry.StillBonded.selector, 1_000_000 + UNBOND_DELAY, block.timestamp);
        vm.expectRevert(bonded);
        vm.prank(PROVIDER);
        registry.withdraw();
        court.execute(id);
        eq(stakeOf(PROVIDER), 0, "stake");
    }

    function test_aNewNodeKeyDoesNotEscapeTheOldOnesDocuments() external {
        bytes memory proof = twoReceipts(0);
        uint256 key = 0x4E77;
        bytes memory sig = signature(key, digest(Types.hashNodeKeyConsent(NodeKeyConsent(PROVIDER, type(uint64).max))));
        vm.prank(PROVIDER);
        registry.rotateNodeKey(vm.addr(key), type(uint64).max, sig);
        court.prove(TWO_RECEIPTS, proof);
        eq(stakeOf(PROVIDER), STAKE / 2, "stake");
        Commitment memory c = commitmentOf(1);
        sig = signature(PROVIDER_KEY, digest(Types.hashCommitment(c)));
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotTheProviders.selector, vm.addr(PROVIDER_KEY), PROVIDER));
        court.commit(c, sig);
    }

    function test_seatsOutliveRetirementAndSoDoesTheirPenalty() external {
        bytes32 id = open(1);
        Verdict memory lie = verdict(ICourt.Outcome.IMPROBABLE);
        lie.gaps = OTHER_GAPS;
        address liar = members(id)[0];
        round(id, verdict(ICourt.Outcome.PASS), 1, lie);
        vm.prank(liar);
        court.retire();
        vm.prank(liar);
        registry.requestUnbond(VALIDATOR_STAKE);
        agree(id, ICourt.Outcome.PASS);
        eq(stakeOf(liar), VALIDATOR_STAKE - PENALTY, "penalty out of what unbonds");
    }

    // ------------------------------------------------------------------------------------------- punished twice

    function test_oneLieAboutAJobIsPunishedOnceHoweverItIsShown() external {
        WorkReceipt memory a = receiptOf(bytes32(uint256(7)), 30);
        WorkReceipt memory b = receiptOf(bytes32(uint256(7)), 31);
        WorkReceipt memory next = receiptOf(bytes32(uint256(7)), 40);
        next.step = 1;
        next.previous = digest(Types.hashWorkReceipt(a));
        court.prove(TWO_RECEIPTS, abi.encode(a, sign(a), b, sign(b)));
        eq(stakeOf(PROVIDER), STAKE / 2, "once");
        bytes memory proof = abi.encode(b, sign(b), next, sign(next));
        (, bytes32 faultId,,,) = faults.judge(BROKEN_CHAIN, proof);
        vm.expectRevert(abi.encodeWithSelector(IRegistry.FaultAlreadyPunished.selector, faultId));
        court.prove(BROKEN_CHAIN, proof);
    }

    /// @dev By its own word a cheat gets back a tenth of what it loses at most, and its payers never its whole cap.
    function test_accusingOneselfCostsNineTenths() external {
        openChannel(PROVIDER, 0x5E1F);
        uint256 before = token.balanceOf(PROVIDER);
        WorkReceipt memory a = receiptOf(bytes32(uint256(7)), 1 ether);
        a.client = vm.addr(0x5E1F);
        WorkReceipt memory b = receiptOf(bytes32(uint256(7)), 2 ether);
        b.client = a.client;
        bytes memory proof = abi.encode(a, sign(a), b, sign(b));
        vm.prank(PROVIDER);
        court.prove(TWO_RECEIPTS, proof);
        eq(token.balanceOf(PROVIDER) - before, STAKE / 2 / 10, "a tenth of half");
        eq(stakeOf(PROVIDER), STAKE / 2, "stake");
    }

    // --------------------------------------------------------------------------------------------------- too dear

    /// @dev An output of 131,072 tokens, all of them flagged, cost 29 million gas to reveal: it could not be judged.
    function test_theWorstOfCheatsIsAffordableToReveal() external {
        bytes32 id = open(1);
        Verdict memory v = verdict(ICourt.Outcome.IMPROBABLE);
        (v.tokens, v.flags, v.worstTokens, v.worstFlags) = (1 << 20, 1 << 20, 1 << 20, 1 << 20);
        (v.voids, v.worstVoids) = (1 << 20, 1 << 20);
        address[] memory who = members(id);
        for (uint256 i; i < who.length; ++i) {
            submit(id, who[i], v);
        }
        Verdict memory mine = fitted(v, id, who[0]);
        vm.prank(who[0]);
        uint256 gas = gasleft();
        court.reveal(mine);
        isTrue(gas - gasleft() < 1_200_000, "reveal");
        reveal(id, who[1], v);
        reveal(id, who[2], v);
        court.conclude(id);
    }

    /// @dev Every place taken and the largest committees: each step fits in half a block of 30 million. Storage is warm
    /// in one test; cold it costs 2,000 more a slot, some 3.3 million for 512 validators.
    function test_aFullHouseAndTheLargestCommitteesFitInABlock() external {
        for (uint256 i = VALIDATORS; i < court.chamber().MAX_VALIDATORS(); ++i) {
            settle(validator(i), 0x100 + i, VALIDATOR_STAKE);
            vm.prank(validator(i));
            court.enlist();
        }
        vm.roll(block.number + 1);
        bytes32 id = commit(1);
        vm.roll(block.number + 2);
        uint256 gas = gasleft();
        court.draw(id);
        isTrue(gas - gasleft() < 11_000_000, "draw");
        for (uint256 i; i < 2; ++i) {
            agreeButNotConclude(id);
            gas = gasleft();
            court.conclude(id);
            isTrue(gas - gasleft() < 11_000_000, "conclude, and the next draw");
        }
        eq(members(id).length, 31, "seats");
        agreeButNotConclude(id);
        gas = gasleft();
        court.conclude(id);
        isTrue(gas - gasleft() < 11_000_000, "the last count");
    }

    function agreeButNotConclude(bytes32 id) private {
        address[] memory who = members(id);
        Verdict memory v = verdict(ICourt.Outcome.VOID);
        for (uint256 i; i < who.length; ++i) {
            submit(id, who[i], v);
        }
        for (uint256 i; i < who.length; ++i) {
            reveal(id, who[i], v);
        }
    }

    // ---------------------------------------------------------------------------------------------------- helpers

    function commitmentKey(uint64 epoch) private view returns (bytes32) {
        return keccak256(abi.encode(PROVIDER, profileId, epoch));
    }

    function opened(Entry memory x, Entry memory y) private returns (bytes32 id, SumNode memory right) {
        Commitment memory c = commitmentOf(1);
        SumNode memory root;
        (root,, right) = tree(x, y);
        (c.root, c.total) = (root.hash, root.total);
        id = post(c);
        vm.roll(block.number + 2);
        court.draw(id);
    }

    function refuseStrike(
        bytes32 id,
        Entry memory entry,
        SumNode memory sibling,
        JobRequest memory order,
        uint256 signer,
        address member
    ) private {
        bytes memory sig = signature(signer, digest(Types.hashJobRequest(order)));
        SumNode[] memory siblings = one(sibling);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotInTheTree.selector));
        court.disqualify(id, entry, 0, siblings, order, sig, member);
    }

    function twoReceipts(uint32 step) private view returns (bytes memory) {
        WorkReceipt memory a = receiptOf(bytes32(uint256(7)), 30);
        WorkReceipt memory b = receiptOf(bytes32(uint256(7)), 31);
        (a.step, b.step) = (step, step);
        return abi.encode(a, sign(a), b, sign(b));
    }

    function sign(WorkReceipt memory r) private view returns (bytes memory) {
        return signature(PROVIDER_KEY, digest(Types.hashWorkReceipt(r)));
    }
}
