// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Court} from "../src/Court.sol";
import {Escrow} from "../src/Escrow.sol";
import {Faults} from "../src/Faults.sol";
import {ICourt} from "../src/ICourt.sol";
import {ITallyToken} from "../src/ITallyToken.sol";
import {Registry} from "../src/Registry.sol";
import {Entry, SumNode, SumTree} from "../src/SumTree.sol";
import {TallyToken} from "../src/TallyToken.sol";
import {
    Commitment,
    JobRequest,
    NodeKeyConsent,
    Profile,
    SessionConsent,
    Types,
    Verdict,
    WorkReceipt
} from "../src/Types.sol";
import {Checks, vm} from "./Vm.sol";

/// @notice A whole deployment with one provider and eight validators, and the documents that move a case.
abstract contract CourtFixture is Checks {
    uint256 internal constant SUPPLY = 1_000_000 ether;
    uint256 internal constant UNBOND_DELAY = 7 days;
    uint256 internal constant STAKE = 10_000;
    uint256 internal constant VALIDATOR_STAKE = 1_000;
    uint256 internal constant PENALTY = 300;
    uint256 internal constant BOND = 50;
    uint256 internal constant VALIDATORS = 8;
    uint32 internal constant EPOCH = 100;
    uint32 internal constant FLAG_PPM = 1_000;

    address internal constant PROVIDER = address(0xA11CE);
    uint256 internal constant PROVIDER_KEY = 0xA11CE;
    address internal constant CLIENT = address(0xC11E27);
    uint256 internal constant SESSION_KEY = 0x5E55;
    bytes32 internal constant SECRET = keccak256("secret of the first lot");
    bytes32 internal constant GAPS = hex"0100020003000400050006000700080009000a000b000c000d000e000f001000";
    bytes32 internal constant OTHER_GAPS = bytes32(0);

    TallyToken internal token;
    Escrow internal escrow;
    Registry internal registry;
    Faults internal faults;
    Court internal court;
    bytes32 internal profileId;

    function ruleSet() internal pure virtual returns (ICourt.Rules memory) {
        return
            ICourt.Rules(
                EPOCH, 200, 30, 20, 15, [3, 4, 7], 10_000, uint96(VALIDATOR_STAKE), uint96(PENALTY), uint96(BOND)
            );
    }

    function deploy() internal {
        vm.warp(1_000_000);
        vm.roll(1_000);
        token = new TallyToken(address(this), address(this), SUPPLY);
        ITallyToken money = ITallyToken(address(token));
        escrow = new Escrow(money, 1 days);
        address there = vm.computeCreateAddress(address(this), vm.getNonce(address(this)) + 2);
        registry = new Registry(money, address(escrow), there, 1_000, UNBOND_DELAY, 1 hours, 1 days, 1 days, 1 days);
        faults = new Faults(registry, escrow, ICourt(there));
        court = new Court(registry, escrow, money, faults, ruleSet());
        eq(address(court), there, "the Court's address");
        Profile memory profile;
        profile.flagPpm = FLAG_PPM;
        profileId = court.registerProfile(profile);
        settle(PROVIDER, PROVIDER_KEY, STAKE);
        openChannel(CLIENT, SESSION_KEY);
        for (uint256 i; i < VALIDATORS; ++i) {
            settle(validator(i), 0x100 + i, VALIDATOR_STAKE);
            vm.prank(validator(i));
            court.enlist();
        }
        vm.roll(1_001);
    }

    // ------------------------------------------------------------------------------------------------- who is there

    function validator(uint256 i) internal pure returns (address) {
        return address(uint160(0xFACE00 + i));
    }

    /// @dev A node key and stake.
    function settle(address wallet, uint256 key, uint256 amount) internal {
        bytes32 consent = Types.hashNodeKeyConsent(NodeKeyConsent(wallet, type(uint64).max));
        bytes memory sig = signature(key, digest(consent));
        vm.prank(wallet);
        registry.register(vm.addr(key), type(uint64).max, sig);
        stake(wallet, amount);
    }

    function stake(address wallet, uint256 amount) internal {
        require(token.transfer(wallet, amount));
        vm.prank(wallet);
        token.approve(address(registry), amount);
        vm.prank(wallet);
        registry.stake(amount);
    }

    /// @dev A channel with the provider that `key` spends from and `owner` owns.
    function openChannel(address owner, uint256 key) internal {
        require(token.transfer(owner, 1_000));
        vm.prank(owner);
        token.approve(address(escrow), 1_000);
        bytes32 consent = Types.hashSessionConsent(SessionConsent(owner, PROVIDER, type(uint64).max));
        bytes memory sig = signature(key, digest(consent));
        vm.prank(owner);
        escrow.open(PROVIDER, vm.addr(key), 1_000, type(uint64).max, sig);
    }

    function stakeOf(address wallet) internal view returns (uint256) {
        (uint96 active, uint96 unbonding,) = registry.stakeOf(wallet);
        return uint256(active) + unbonding;
    }

    function digest(bytes32 structHash) internal view returns (bytes32) {
        return Types.digest(escrow.domainSeparator(), structHash);
    }

    // ------------------------------------------------------------------------------------------------- commitments

    /// @dev A receipt of the provider's for `amount` wei from the client's channel.
    function receiptOf(bytes32 jobId, uint96 amount) internal pure returns (WorkReceipt memory receipt) {
        receipt.provider = PROVIDER;
        receipt.client = vm.addr(SESSION_KEY);
        receipt.jobId = jobId;
        receipt.receivedAt = 1_000_000_000;
        receipt.total = amount;
    }

    function entryOf(WorkReceipt memory receipt) internal view returns (Entry memory) {
        return Entry(receipt.jobId, digest(Types.hashWorkReceipt(receipt)), receipt.total);
    }

    /// @dev A job that the session key `key` orders of the provider, for 30 wei.
    function requestBy(uint256 key) internal pure returns (JobRequest memory request) {
        (request.provider, request.client) = (PROVIDER, vm.addr(key));
    }

    function entryOf(JobRequest memory request) internal view returns (Entry memory) {
        return Entry(digest(Types.hashJobRequest(request)), keccak256("receipt"), 30);
    }

    /// @dev Two jobs: root, and the two leaves.
    function tree(Entry memory a, Entry memory b)
        internal
        pure
        returns (SumNode memory, SumNode memory, SumNode memory)
    {
        (SumNode memory left, SumNode memory right) = (SumTree.leaf(a), SumTree.leaf(b));
        bytes memory packed =
            abi.encodePacked(uint8(1), left.hash, uint256(left.total), right.hash, uint256(right.total));
        return (SumNode(keccak256(packed), left.total + right.total), left, right);
    }

    function jobs() internal view returns (WorkReceipt memory a, WorkReceipt memory b, Entry memory x, Entry memory y) {
        (a, b) = (receiptOf(bytes32(uint256(1)), 30), receiptOf(bytes32(uint256(2)), 70));
        (x, y) = (entryOf(a), entryOf(b));
    }

    function commitmentOf(uint64 epoch) internal view returns (Commitment memory) {
        (,, Entry memory x, Entry memory y) = jobs();
        (SumNode memory root,,) = tree(x, y);
        return Commitment(PROVIDER, profileId, epoch, root.hash, 2, root.total, keccak256(abi.encode(SECRET)));
    }

    function commit(uint64 epoch) internal returns (bytes32) {
        return post(commitmentOf(epoch));
    }

    function post(Commitment memory c) internal returns (bytes32) {
        bytes memory sig = signature(PROVIDER_KEY, digest(Types.hashCommitment(c)));
        return court.commit(c, sig);
    }

    /// @dev Commits to an epoch and draws its case.
    function open(uint64 epoch) internal returns (bytes32 key) {
        key = commit(epoch);
        vm.roll(block.number + 2);
        court.draw(key);
    }

    function one(SumNode memory node) internal pure returns (SumNode[] memory nodes) {
        nodes = new SumNode[](1);
        nodes[0] = node;
    }

    // ----------------------------------------------------------------------------------------------------- verdicts

    function verdict(ICourt.Outcome outcome) internal pure returns (Verdict memory v) {
        v.outcome = uint8(outcome);
        v.tokens = 1_000;
        v.gaps = GAPS;
        v.salt = keccak256("salt");
        if (outcome == ICourt.Outcome.IMPROBABLE) {
            (v.flags, v.worstTokens, v.worstFlags) = (90, 500, 80);
        }
        if (outcome == ICourt.Outcome.VOID) {
            (v.flags, v.voids, v.worstTokens, v.worstFlags, v.worstVoids) = (1, 1, 500, 1, 1);
        }
    }

    function members(bytes32 caseId) internal view returns (address[] memory found) {
        ICourt.Seat[] memory seats = court.seatsOf(caseId, court.caseOf(caseId).round);
        found = new address[](seats.length);
        for (uint256 i; i < seats.length; ++i) {
            found[i] = seats[i].validator;
        }
    }

    function fitted(Verdict memory v, bytes32 caseId, address member) internal view returns (Verdict memory) {
        Verdict memory w = abi.decode(abi.encode(v), (Verdict));
        (w.caseId, w.validator, w.round) = (caseId, member, court.caseOf(caseId).round);
        return w;
    }

    function submit(bytes32 caseId, address member, Verdict memory v) internal {
        bytes32 sealed_ = digest(Types.hashVerdict(fitted(v, caseId, member)));
        vm.prank(member);
        court.submit(caseId, sealed_);
    }

    function reveal(bytes32 caseId, address member, Verdict memory v) internal {
        Verdict memory w = fitted(v, caseId, member);
        vm.prank(member);
        court.reveal(w);
    }

    /// @dev All members of the round vote: the first `others` of them `dissent`, the rest `v`. Then it is counted.
    function round(bytes32 caseId, Verdict memory v, uint256 others, Verdict memory dissent) internal {
        address[] memory who = members(caseId);
        for (uint256 i; i < who.length; ++i) {
            submit(caseId, who[i], i < others ? dissent : v);
        }
        for (uint256 i; i < who.length; ++i) {
            reveal(caseId, who[i], i < others ? dissent : v);
        }
        court.conclude(caseId);
    }

    function agree(bytes32 caseId, ICourt.Outcome outcome) internal {
        round(caseId, verdict(outcome), 0, verdict(outcome));
    }

    function stateOf(bytes32 caseId) internal view returns (uint256) {
        return uint256(court.caseOf(caseId).state);
    }
}
