// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Faults} from "../src/Faults.sol";
import {IFaults} from "../src/IFaults.sol";
import {IRegistry} from "../src/IRegistry.sol";
import {Entry, SumNode} from "../src/SumTree.sol";
import {Commitment, Tariff, Types, WorkReceipt} from "../src/Types.sol";
import {CourtFixture} from "./CourtFixture.sol";
import {vm} from "./Vm.sol";

/// @notice Each kind of objective fault: a proof that holds and is punished once, and what does not hold.
contract FaultsTest is CourtFixture {
    uint8 private constant TWO_TARIFFS = 0;
    uint8 private constant TWO_RECEIPTS = 1;
    uint8 private constant PRICE = 2;
    uint8 private constant BROKEN_CHAIN = 3;
    uint8 private constant MISSING = 4;
    uint8 private constant UNSORTED = 5;
    uint8 private constant UNCOMMITTED = 6;
    address private constant REPORTER = address(0x4E9);

    Tariff private tariff;

    function setUp() public {
        deploy();
        tariff.provider = PROVIDER;
        tariff.sequence = 1;
        tariff.profileId = profileId;
        (tariff.promptPrice, tariff.completionPrice, tariff.cachedPrice) = (3, 7, 1);
        (tariff.standardBps, tariff.baseMinBps, tariff.baseMaxBps) = (10_000, 5_000, 20_000);
        tariff.longContextThreshold = 1_000;
        tariff.validFrom = uint64(block.timestamp + 1 hours);
        tariff.validUntil = tariff.validFrom + 1 days;
        Tariff memory sheet = tariff;
        bytes memory sig = signature(PROVIDER_KEY, digest(Types.hashTariff(sheet)));
        registry.logTariff(sheet, sig);
        vm.warp(tariff.validFrom + 10);
    }

    // -------------------------------------------------------------------------------------------------- two documents

    function test_twoTariffsUnderOneSequence() external {
        Tariff memory a = tariff;
        Tariff memory b = tariff;
        b.promptPrice += 1;
        refuse(TWO_TARIFFS, abi.encode(a, sign(a), a, sign(a)), "different sheets");
        bytes memory proof = abi.encode(a, sign(a), b, sign(b));
        punish(TWO_TARIFFS, proof, STAKE / 2, 0);
        b.promptPrice += 1;
        (, bytes32 faultId,,,) = faults.judge(TWO_TARIFFS, proof);
        proof = abi.encode(a, sign(a), b, sign(b));
        vm.expectRevert(abi.encodeWithSelector(IRegistry.FaultAlreadyPunished.selector, faultId));
        court.prove(TWO_TARIFFS, proof);
        b.sequence = 2;
        refuse(TWO_TARIFFS, abi.encode(a, sign(a), b, sign(b)), "one provider, profile and sequence");
    }

    function test_twoReceiptsOfOneStepPayTheirPayer() external {
        WorkReceipt memory a = priced();
        WorkReceipt memory b = priced();
        b.total += 9;
        refuse(TWO_RECEIPTS, abi.encode(a, sign(a), a, sign(a)), "two receipts of one step");
        punish(TWO_RECEIPTS, abi.encode(a, sign(a), b, sign(b)), STAKE / 2, 250);
        b.jobId = keccak256("another job");
        refuse(TWO_RECEIPTS, abi.encode(a, sign(a), b, sign(b)), "one provider and job");
    }

    function test_nobodyIsAccusedByAnothersSignature() external {
        WorkReceipt memory a = priced();
        WorkReceipt memory b = priced();
        b.total += 9;
        bytes memory forged = signature(0x100, digest(Types.hashWorkReceipt(b)));
        bytes memory proof = abi.encode(a, sign(a), b, forged);
        vm.expectRevert(abi.encodeWithSelector(IFaults.NotSignedBy.selector, PROVIDER, validator(0)));
        faults.judge(TWO_RECEIPTS, proof);
        forged = signature(0xBAD, digest(Types.hashWorkReceipt(b)));
        proof = abi.encode(a, sign(a), b, forged);
        vm.expectRevert(abi.encodeWithSelector(IFaults.NotSignedBy.selector, PROVIDER, address(0)));
        faults.judge(TWO_RECEIPTS, proof);
        vm.expectRevert(abi.encodeWithSelector(IFaults.UnknownKind.selector, 7));
        faults.judge(7, "");
    }

    function test_brokenChains() external {
        WorkReceipt memory a = priced();
        WorkReceipt memory b = priced();
        (a.step, b.step) = (1, 2);
        b.previous = digest(Types.hashWorkReceipt(a));
        refuseChain(a, b);
        b.total = a.total - 1;
        chain(a, b);
        b.refund = 1;
        refuseChain(a, b);
        (b.refund, b.multiplier) = (0, a.multiplier + 1);
        refuseChain(a, b);
        b.total = a.total;
        b.completionTokens = a.completionTokens - 1;
        chain(a, b);
        b.completionTokens = a.completionTokens;
        a.steMicro = 1;
        b.previous = digest(Types.hashWorkReceipt(a));
        chain(a, b);
        b.steMicro = 1;
        b.previous = keccak256("another");
        chain(a, b);
        b.step = 3;
        refuseChain(a, b);
        a.isFinal = true;
        chain(a, b);
        punish(BROKEN_CHAIN, abi.encode(a, sign(a), b, sign(b)), STAKE / 2, 250);
    }

    // --------------------------------------------------------------------------------------------------------- price

    function test_aPriceIsTheTariffs() external {
        WorkReceipt memory r = priced();
        refusePrice(r);
        r.total += 1;
        punish(PRICE, abi.encode(tariff, r, sign(r)), STAKE / 10, 50);
    }

    function test_everyFieldOfThePriceCounts() external view {
        WorkReceipt memory r = priced();
        r.total -= 1;
        price(r);
        r = priced();
        r.promptLine += 1;
        price(r);
        r = priced();
        r.multiplier += 1;
        price(r);
        r = priced();
        r.cachedTokens = r.promptTokens + 1;
        price(r);
        r = priced();
        r.kind = 3;
        price(r);
        r = priced();
        r.tier = 0;
        price(r);
        r = priced();
        r.tier = 9;
        price(r);
        r = priced();
        r.baseBps = 20_001;
        price(r);
        r = priced();
        r.reservation = bytes32(uint256(1));
        r.baseBps = 9_999;
        price(r);
        r = priced();
        r.receivedAt = (tariff.validFrom - 1) * 1000;
        price(r);
        r = priced();
        r.receivedAt = tariff.validUntil * 1000;
        price(r);
    }

    function test_aPriceNeedsTheLoggedTariffThatTheReceiptNames() external {
        WorkReceipt memory r = priced();
        r.total += 1;
        Tariff memory other = tariff;
        other.promptPrice += 1;
        refuse(PRICE, abi.encode(other, r, sign(r)), "the tariff that the receipt names");
        r.tariffHash = digest(Types.hashTariff(other));
        refuse(PRICE, abi.encode(other, r, sign(r)), "a logged tariff");
    }

    // --------------------------------------------------------------------------------------------------- commitments

    function test_aJobThatIsNotInItsTreeIsMissing() external {
        (bytes32 key, Faults.Leaf memory left, Faults.Leaf memory right) = committed(2, 4);
        uint64 received = uint64(court.commitments(key).epoch) * EPOCH * 1000;
        missing(received, 1, list(left), true);
        missing(received, 1, list(right), false);
        missing(received, 5, list(right), true);
        missing(received, 5, list(left), false);
        missing(received, 3, list(left, right), true);
        missing(received, 3, list(right, left), false);
        missing(received, 2, list(left, right), false);
        missing(received, 4, list(left, right), false);
        missing(received, 1, list(), false);
        WorkReceipt memory r = receiptAt(received, 3);
        left.entry.amount += 1;
        refuse(MISSING, abi.encode(tariff, r, sign(r), list(left, right)), "an entry of the commitment");
        left.entry.amount -= 1;
        punish(MISSING, abi.encode(tariff, r, sign(r), list(left, right)), STAKE / 2, 30);
        r = receiptAt(received + EPOCH * 1000, 3);
        refuse(MISSING, abi.encode(tariff, r, sign(r), list(left, right)), "a commitment");
    }

    function test_anEmptyTreeMissesEveryJob() external {
        uint64 epoch = uint64(block.timestamp / EPOCH) - 1;
        post(Commitment(PROVIDER, profileId, epoch, 0, 0, 0, 0));
        missing(epoch * EPOCH * 1000, 1, list(), true);
    }

    function test_aTreeIsInOrder() external {
        (bytes32 key, Faults.Leaf memory left, Faults.Leaf memory right) = committed(2, 4);
        refuse(UNSORTED, abi.encode(key, left, right), "a wrong order");
        refuse(UNSORTED, abi.encode(key, right, left), "neighbours");
        vm.warp(block.timestamp + EPOCH);
        (key, left, right) = committed(4, 2);
        punish(UNSORTED, abi.encode(key, left, right), STAKE / 2, 0);
        vm.warp(block.timestamp + EPOCH);
        (key, left, right) = committed(4, 4);
        faults.judge(UNSORTED, abi.encode(key, left, right));
    }

    function test_aCommitmentIsDueInItsWindow() external {
        uint64 epoch = uint64(block.timestamp / EPOCH);
        WorkReceipt memory r = receiptAt(epoch * EPOCH * 1000, 3);
        bytes memory proof = abi.encode(tariff, r, sign(r));
        uint256 overdue = (uint256(epoch) + 1) * EPOCH + 200;
        vm.warp(overdue - 1);
        refuse(UNCOMMITTED, proof, "a window that is over");
        vm.warp(overdue);
        (address accused,, uint16 shareBps, address payer, uint96 cap) = faults.judge(UNCOMMITTED, proof);
        eq(accused, PROVIDER, "accused");
        eq(shareBps, 1_000, "share");
        eq(payer, CLIENT, "payer");
        eq(cap, 30, "cap");
        Commitment memory c = commitmentOf(epoch);
        post(c);
        refuse(UNCOMMITTED, proof, "no commitment");
        r = receiptAt(999_000_000, 3);
        refuse(UNCOMMITTED, abi.encode(tariff, r, sign(r)), "an epoch begun under an accepted profile");
    }

    // -------------------------------------------------------------------------------------------------------- helpers

    /// @dev 100 prompt tokens, 20 of them cached, 50 of output, at a base multiplier of 1.5.
    function priced() private view returns (WorkReceipt memory r) {
        r = receiptAt((tariff.validFrom + 5) * 1000, 7);
        (r.tier, r.baseBps) = (1, 15_000);
        (r.promptTokens, r.cachedTokens, r.completionTokens) = (100, 20, 50);
        (r.promptLine, r.cachedLine, r.completionLine) = (240, 20, 350);
        r.multiplier = 1.5e16;
        r.total = 915;
    }

    function receiptAt(uint64 receivedAt, uint256 jobId) private view returns (WorkReceipt memory r) {
        r = receiptOf(bytes32(jobId), 30);
        r.receivedAt = receivedAt;
        r.tariffHash = digest(Types.hashTariff(tariff));
    }

    function sign(WorkReceipt memory r) private view returns (bytes memory) {
        return signature(PROVIDER_KEY, digest(Types.hashWorkReceipt(r)));
    }

    function sign(Tariff memory t) private view returns (bytes memory) {
        return signature(PROVIDER_KEY, digest(Types.hashTariff(t)));
    }

    /// @dev A commitment of the epoch before this one with these two jobs, in this order.
    function committed(uint256 first, uint256 second)
        private
        returns (bytes32 key, Faults.Leaf memory left, Faults.Leaf memory right)
    {
        Entry memory x = entryOf(receiptOf(bytes32(first), 30));
        Entry memory y = entryOf(receiptOf(bytes32(second), 70));
        (SumNode memory root, SumNode memory a, SumNode memory b) = tree(x, y);
        Commitment memory c = commitmentOf(uint64(block.timestamp / EPOCH) - 1);
        (c.root, c.total) = (root.hash, root.total);
        key = post(c);
        (left, right) = (Faults.Leaf(x, 0, one(b)), Faults.Leaf(y, 1, one(a)));
    }

    function list() private pure returns (Faults.Leaf[] memory) {
        return new Faults.Leaf[](0);
    }

    function list(Faults.Leaf memory a) private pure returns (Faults.Leaf[] memory leaves) {
        leaves = new Faults.Leaf[](1);
        leaves[0] = a;
    }

    function list(Faults.Leaf memory a, Faults.Leaf memory b) private pure returns (Faults.Leaf[] memory leaves) {
        leaves = new Faults.Leaf[](2);
        (leaves[0], leaves[1]) = (a, b);
    }

    function missing(uint64 received, uint256 jobId, Faults.Leaf[] memory around, bool holds) private {
        WorkReceipt memory r = receiptAt(received, jobId);
        bytes memory proof = abi.encode(tariff, r, sign(r), around);
        if (holds) faults.judge(MISSING, proof);
        else refuse(MISSING, proof, "the job's absence");
    }

    function chain(WorkReceipt memory a, WorkReceipt memory b) private view {
        faults.judge(BROKEN_CHAIN, abi.encode(a, sign(a), b, sign(b)));
    }

    function refuseChain(WorkReceipt memory a, WorkReceipt memory b) private {
        refuse(BROKEN_CHAIN, abi.encode(a, sign(a), b, sign(b)), "a broken chain");
    }

    function price(WorkReceipt memory r) private view {
        faults.judge(PRICE, abi.encode(tariff, r, sign(r)));
    }

    function refusePrice(WorkReceipt memory r) private {
        refuse(PRICE, abi.encode(tariff, r, sign(r)), "a wrong price");
    }

    function refuse(uint8 kind, bytes memory proof, string memory step) private {
        vm.expectRevert(abi.encodeWithSelector(IFaults.NotProven.selector, step));
        faults.judge(kind, proof);
    }

    /// @dev Proves the fault: `slashed` is taken, a twentieth of it is the reporter's, `back` the payer's.
    function punish(uint8 kind, bytes memory proof, uint256 slashed, uint256 back) private {
        uint256 before = token.balanceOf(CLIENT);
        uint256 supply = token.totalSupply();
        vm.prank(REPORTER);
        court.prove(kind, proof);
        eq(stakeOf(PROVIDER), STAKE - slashed, "slashed");
        eq(token.balanceOf(REPORTER), slashed / 20, "the reporter's");
        eq(token.balanceOf(CLIENT) - before, back, "the payer's");
        eq(supply - token.totalSupply(), slashed - slashed / 20 - back, "burned");
        eq(token.balanceOf(address(court)), 0, "nothing is left");
    }
}
