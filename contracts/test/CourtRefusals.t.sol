// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Chamber} from "../src/Chamber.sol";
import {Court} from "../src/Court.sol";
import {ICourt} from "../src/ICourt.sol";
import {ITallyToken} from "../src/ITallyToken.sol";
import {Commitment, Profile, Types, Verdict} from "../src/Types.sol";
import {CourtFixture} from "./CourtFixture.sol";
import {vm} from "./Vm.sol";

/// @notice What the Court refuses, and who is drawn.
contract CourtRefusalsTest is CourtFixture {
    function setUp() public {
        deploy();
    }

    function test_rulesAreSaneAndStakeOutlastsThem() external {
        ICourt.Rules memory r = ruleSet();
        r.submitWindow = 0;
        refuseRules(r, abi.encodeWithSelector(ICourt.BadRules.selector));
        r = ruleSet();
        r.committees = [2, 4, 7];
        refuseRules(r, abi.encodeWithSelector(ICourt.BadRules.selector));
        r.committees = [4, 3, 7];
        refuseRules(r, abi.encodeWithSelector(ICourt.BadRules.selector));
        r.committees = [3, 4, 32];
        refuseRules(r, abi.encodeWithSelector(ICourt.BadRules.selector));
        r = ruleSet();
        r.forcedBps = 10_001;
        refuseRules(r, abi.encodeWithSelector(ICourt.BadRules.selector));
        r = ruleSet();
        r.validatorStake = 0;
        refuseRules(r, abi.encodeWithSelector(ICourt.BadRules.selector));
        r = ruleSet();
        r.commitWindow = uint32(UNBOND_DELAY) / 2 - 100 - 3 * 65;
        refuseRules(r, abi.encodeWithSelector(ICourt.UnbondDelayTooShort.selector, UNBOND_DELAY, UNBOND_DELAY));
    }

    function test_profilesGrantAFewFlags() external {
        Profile memory p;
        vm.expectRevert(abi.encodeWithSelector(ICourt.FlagRate.selector, 0));
        court.registerProfile(p);
        p.flagPpm = 20_001;
        vm.expectRevert(abi.encodeWithSelector(ICourt.FlagRate.selector, 20_001));
        court.registerProfile(p);
        p.flagPpm = 20_000;
        vm.expectEmit();
        emit ICourt.ProfileAccepted(Types.hashProfile(p), 20_000);
        bytes32 id = court.registerProfile(p);
        eq(court.profileFlagPpm(id), 20_000, "flagPpm");
        eq(court.profileSince(id), block.timestamp, "since");
        vm.warp(block.timestamp + 1);
        eq(court.registerProfile(p), id, "again");
        eq(court.profileSince(id), block.timestamp - 1, "since stays");
    }

    function test_enlistingNeedsAKeyAndStake() external {
        address newcomer = address(0x4E3);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotRegistered.selector, newcomer));
        vm.prank(newcomer);
        court.enlist();
        vm.expectRevert(abi.encodeWithSelector(ICourt.AlreadyEnlisted.selector, validator(0)));
        vm.prank(validator(0));
        court.enlist();
        vm.prank(validator(0));
        court.retire();
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotEnlisted.selector, validator(0)));
        vm.prank(validator(0));
        court.retire();
        eq(court.validators().length, VALIDATORS - 1, "retired");
        eq(court.validators()[0], validator(VALIDATORS - 1), "the last takes its place");
        vm.prank(validator(0));
        registry.requestUnbond(VALIDATOR_STAKE);
        vm.expectRevert(abi.encodeWithSelector(ICourt.StakeTooLow.selector, 0, VALIDATOR_STAKE));
        vm.prank(validator(0));
        court.enlist();
    }

    function test_placesAreNotHeldWithoutStake() external {
        vm.expectRevert(abi.encodeWithSelector(ICourt.StillStaked.selector, validator(3)));
        court.expel(validator(3));
        vm.prank(validator(3));
        registry.requestUnbond(VALIDATOR_STAKE);
        court.expel(validator(3));
        eq(court.validators().length, VALIDATORS - 1, "expelled");
    }

    function test_theChamberObeysTheCourtAlone() external {
        Chamber chamber = court.chamber();
        bytes memory refusal = abi.encodeWithSelector(Chamber.NotCourt.selector, address(this), address(court));
        vm.expectRevert(refusal);
        chamber.enlist(validator(0));
        vm.expectRevert(refusal);
        chamber.remove(validator(0), false);
        vm.expectRevert(refusal);
        chamber.forget(PROVIDER);
    }

    function test_aCommitmentIsTheProvidersOfAnEpochThatIsOver() external {
        Commitment memory c = commitmentOf(1);
        c.profileId = keccak256("unknown");
        refuseCommitment(c, PROVIDER_KEY, abi.encodeWithSelector(ICourt.UnknownProfile.selector, c.profileId));
        c = commitmentOf(uint64(block.timestamp / EPOCH));
        uint256 end = (uint256(c.epoch) + 1) * EPOCH;
        refuseCommitment(c, PROVIDER_KEY, abi.encodeWithSelector(ICourt.EpochNotOver.selector, end, block.timestamp));
        c = commitmentOf(1);
        c.count = 0;
        refuseCommitment(c, PROVIDER_KEY, abi.encodeWithSelector(ICourt.EmptyTree.selector));
        c = commitmentOf(1);
        refuseCommitment(c, 0xBAD, abi.encodeWithSelector(ICourt.NotTheProviders.selector, vm.addr(0xBAD), PROVIDER));
        bytes32 key = post(c);
        refuseCommitment(c, PROVIDER_KEY, abi.encodeWithSelector(ICourt.AlreadyCommitted.selector, key));
        ICourt.Made memory made = court.commitments(post(commitmentOf(2)));
        eq(made.previous, key, "previous");
        eq(made.earlier, 2, "earlier");
        eq(made.blockNumber, block.number, "block");
    }

    function test_theBeaconIsOfABlockAfterTheCommitment() external {
        vm.expectRevert(abi.encodeWithSelector(ICourt.UnknownCommitment.selector, bytes32(0)));
        court.draw(0);
        bytes32 key = commit(1);
        uint256 made = block.number;
        vm.roll(made + 1);
        vm.expectRevert(abi.encodeWithSelector(ICourt.TooEarlyToDraw.selector, made + 2, made + 1));
        court.draw(key);
        vm.roll(made + 2);
        court.draw(key);
        eq(court.commitments(key).beacon, keccak256(abi.encode(blockhash(made + 1), key)), "beacon");
        vm.expectRevert(abi.encodeWithSelector(ICourt.AlreadyDrawn.selector, key));
        court.draw(key);
    }

    function test_aHashThatIsForgottenIsReplacedByTheNewest() external {
        bytes32 key = commit(1);
        vm.roll(block.number + 258);
        court.draw(key);
        eq(court.commitments(key).beacon, keccak256(abi.encode(blockhash(block.number - 1), key)), "beacon");
    }

    function test_anEmptyCommitmentIsNotJudged() external {
        bytes32 key = post(Commitment(PROVIDER, profileId, 1, 0, 0, 0, 0));
        vm.roll(block.number + 2);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NothingToJudge.selector, key));
        court.draw(key);
    }

    function test_C4_neitherTheProviderNorWhoCameTooLateIsDrawn() external {
        vm.prank(PROVIDER);
        court.enlist();
        for (uint256 i; i < 6; ++i) {
            vm.prank(validator(i));
            court.retire();
        }
        vm.roll(block.number + 1);
        bytes32 key = commit(1);
        vm.roll(block.number + 1);
        vm.prank(validator(0));
        court.enlist();
        vm.roll(block.number + 1);
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotEnoughValidators.selector, 2));
        court.draw(key);
    }

    function test_enlistingAndRetiringMoveNobodyElse() external {
        bytes32 key = commit(1);
        vm.roll(block.number + 2);
        uint256 snapshot = vm.snapshotState();
        court.draw(key);
        address[] memory who = members(key);
        for (uint256 i; i < VALIDATORS; ++i) {
            address leaver = validator(i);
            if (leaver == who[0] || leaver == who[1] || leaver == who[2]) continue;
            vm.revertToState(snapshot);
            vm.prank(leaver);
            court.retire();
            court.draw(key);
            for (uint256 j; j < 3; ++j) {
                eq(members(key)[j], who[j], "the same committee");
            }
        }
    }

    function test_seatsAreForMembersOnce() external {
        bytes32 id = open(1);
        address[] memory who = members(id);
        vm.expectRevert(abi.encodeWithSelector(ICourt.UnknownCase.selector, bytes32(0)));
        court.submit(0, bytes32(uint256(1)));
        vm.expectRevert(abi.encodeWithSelector(ICourt.NotAMember.selector, PROVIDER));
        vm.prank(PROVIDER);
        court.submit(id, bytes32(uint256(1)));
        vm.expectRevert(abi.encodeWithSelector(ICourt.ZeroDigest.selector));
        vm.prank(who[0]);
        court.submit(id, 0);
        submit(id, who[0], verdict(ICourt.Outcome.PASS));
        vm.expectRevert(abi.encodeWithSelector(ICourt.AlreadySubmitted.selector, who[0]));
        vm.prank(who[0]);
        court.submit(id, bytes32(uint256(1)));
    }

    function test_aVerdictIsTheOneSubmitted() external {
        bytes32 id = open(1);
        address[] memory who = members(id);
        Verdict memory v = verdict(ICourt.Outcome.PASS);
        for (uint256 i; i < 3; ++i) {
            submit(id, who[i], v);
        }
        Verdict memory other = fitted(v, id, who[0]);
        other.tokens += 1;
        bytes memory refusal = abi.encodeWithSelector(ICourt.NotWhatWasSubmitted.selector, who[0]);
        refuseVerdict(other, who[0], refusal);
        refuseVerdict(fitted(v, id, who[1]), who[0], refusal);
        other = fitted(v, id, who[0]);
        other.round = 1;
        refuseVerdict(other, who[0], refusal);
        reveal(id, who[0], v);
        refuseVerdict(fitted(v, id, who[0]), who[0], abi.encodeWithSelector(ICourt.AlreadyRevealed.selector, who[0]));
    }

    function test_aVerdictThatContradictsItselfIsRefused() external {
        Verdict memory v = verdict(ICourt.Outcome.PASS);
        v.voids = 1;
        contradiction(v, 1);
        v.flags = 1;
        contradiction(v, 2);
        v = verdict(ICourt.Outcome.VOID);
        (v.voids, v.worstVoids) = (0, 0);
        contradiction(v, 3);
        v = verdict(ICourt.Outcome.IMPROBABLE);
        v.worstFlags = 3;
        contradiction(v, 4);
        v = verdict(ICourt.Outcome.IMPROBABLE);
        v.outcome = uint8(ICourt.Outcome.PASS);
        contradiction(v, 5);
        v = verdict(ICourt.Outcome.FORGED);
        v.worstTokens = v.tokens + 1;
        contradiction(v, 6);
        v = verdict(ICourt.Outcome.PASS);
        v.outcome = 5;
        contradiction(v, 7);
    }

    function contradiction(Verdict memory v, uint64 epoch) private {
        bytes32 id = open(epoch);
        address[] memory who = members(id);
        for (uint256 i; i < 3; ++i) {
            submit(id, who[i], v);
        }
        refuseVerdict(
            fitted(v, id, who[0]), who[0], abi.encodeWithSelector(ICourt.ContradictsItself.selector, v.outcome)
        );
    }

    function refuseVerdict(Verdict memory v, address sender, bytes memory refusal) private {
        vm.expectRevert(refusal);
        vm.prank(sender);
        court.reveal(v);
    }

    function refuseCommitment(Commitment memory c, uint256 key, bytes memory refusal) private {
        bytes memory sig = signature(key, digest(Types.hashCommitment(c)));
        vm.expectRevert(refusal);
        court.commit(c, sig);
    }

    function refuseRules(ICourt.Rules memory r, bytes memory refusal) private {
        vm.expectRevert(refusal);
        new Court(registry, escrow, ITallyToken(address(token)), faults, r);
    }
}
