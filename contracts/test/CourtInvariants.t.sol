// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ICourt} from "../src/ICourt.sol";
import {Entry, SumNode} from "../src/SumTree.sol";
import {Commitment, Types, Verdict, WorkReceipt} from "../src/Types.sol";
import {CourtFixture} from "./CourtFixture.sol";
import {Checks, vm} from "./Vm.sol";

/// @notice Cases of three providers, two of which are validators too, on whatever way forge takes them.
/// @dev Holds its own deployment. Every action is valid for the state it meets (fail_on_revert), or does nothing.
contract CourtHandler is CourtFixture {
    uint256 public constant PROVIDERS = 3;

    /// @dev Whether members vote as they like, or all find honest work honest.
    bool private immutable _mayLie;

    bytes32[] private _ids;
    uint64 private _epoch;
    mapping(bytes32 id => uint256) private _executions;
    mapping(bytes32 id => uint256) private _evidenceChanges;
    mapping(bytes32 id => mapping(uint8 round => mapping(address member => Verdict))) private _votes;

    /// @notice Totals over everything that happened.
    uint256 public executions;
    uint256 public slashed;

    constructor(bool mayLie) {
        _mayLie = mayLie;
        deploy();
        for (uint256 i; i < PROVIDERS; ++i) {
            vm.prank(provider(i));
            token.approve(address(court), type(uint256).max);
        }
    }

    function provider(uint256 i) public pure returns (address) {
        return i % PROVIDERS == 0 ? PROVIDER : validator(i % PROVIDERS - 1);
    }

    function providerKey(uint256 i) private pure returns (uint256) {
        return i % PROVIDERS == 0 ? PROVIDER_KEY : 0x100 + i % PROVIDERS - 1;
    }

    /// @notice A new case. C4: nobody sits on its own.
    function openCase(uint256 p) external {
        Commitment memory c = commitmentOf(++_epoch);
        c.provider = provider(p);
        bytes memory sig = signature(providerKey(p), digest(Types.hashCommitment(c)));
        bytes32 id = court.commit(c, sig);
        vm.roll(block.number + 2);
        try court.draw(id) {
            _ids.push(id);
            _checkSeats(id);
        } catch (bytes memory refusal) {
            eq(bytes32(bytes4(refusal)), bytes32(ICourt.NotEnoughValidators.selector), "why it was not drawn");
        }
    }

    /// @notice The next step of a case, with members that vote, stay away or come as `seed` has it.
    function advance(uint256 which, uint256 seed) external {
        if (_ids.length == 0) return;
        bytes32 id = _ids[which % _ids.length];
        ICourt.Case memory c = court.caseOf(id);
        address accused = court.commitments(id).provider;
        uint256 evidence = court.evidenceOf(accused);
        if (c.state == ICourt.CaseState.SUBMIT) _submitAll(id, c, seed);
        else if (c.state == ICourt.CaseState.REVEAL) _revealAll(id, c, seed);
        else if (c.state == ICourt.CaseState.ANSWER) _answerOrExecute(id, c, accused, seed);
        _checkEvidence(id, evidence, court.evidenceOf(accused));
    }

    /// @notice Let time pass: windows of all cases run out unequally.
    function wait(uint256 time) external {
        vm.warp(block.timestamp + bound(time, 0, 60));
    }

    /// @notice What a slash took comes back, so that cases go on.
    function restake(uint256 i) external {
        address wallet = i % 2 == 0 ? provider(i / 2) : validator(i / 2 % VALIDATORS);
        uint256 target = wallet == PROVIDER ? STAKE : VALIDATOR_STAKE;
        (uint96 active,,) = registry.stakeOf(wallet);
        if (active < target) stake(wallet, target < 1_000 ? 1_000 : target);
    }

    /// @notice A payer's share of an executed case.
    function compensate(uint256 which, uint256 index) external {
        if (_ids.length == 0) return;
        bytes32 id = _ids[which % _ids.length];
        ICourt.Case memory c = court.caseOf(id);
        if (c.pool == c.paid || court.commitments(id).provider != PROVIDER) return;
        (WorkReceipt memory a, WorkReceipt memory b, Entry memory x, Entry memory y) = jobs();
        (, SumNode memory left, SumNode memory right) = tree(x, y);
        try court.compensate(
            id, index % 2 == 0 ? x : y, index % 2, one(index % 2 == 0 ? right : left), index % 2 == 0 ? a : b
        ) {}
        catch (bytes memory refusal) {
            eq(bytes32(bytes4(refusal)), bytes32(ICourt.AlreadyCompensated.selector), "why it was not paid");
        }
    }

    // ---------------------------------------------------------------------------------------------------- steps

    function _submitAll(bytes32 id, ICourt.Case memory c, uint256 seed) private {
        ICourt.Seat[] memory seats = court.seatsOf(id, c.round);
        for (uint256 i; i < seats.length; ++i) {
            if (seats[i].status != ICourt.SeatStatus.EMPTY || _draw(seed, i) % 8 == 0) continue;
            Verdict memory v = fitted(_opinion(_draw(seed, i)), id, seats[i].validator);
            _votes[id][c.round][seats[i].validator] = v;
            bytes32 sealed_ = digest(Types.hashVerdict(v));
            vm.prank(seats[i].validator);
            court.submit(id, sealed_);
        }
        if (seed % 2 == 0 && block.timestamp < c.until) vm.warp(c.until);
    }

    function _revealAll(bytes32 id, ICourt.Case memory c, uint256 seed) private {
        ICourt.Seat[] memory seats = court.seatsOf(id, c.round);
        for (uint256 i; i < seats.length && block.timestamp < c.until; ++i) {
            if (seats[i].status != ICourt.SeatStatus.SUBMITTED || _draw(seed, i) % 10 == 0) continue;
            Verdict memory v = _votes[id][c.round][seats[i].validator];
            vm.prank(seats[i].validator);
            court.reveal(v);
        }
        c = court.caseOf(id);
        if (c.revealed != c.submitted && block.timestamp < c.until) vm.warp(c.until);
        court.conclude(id);
        _checkSeats(id);
    }

    function _answerOrExecute(bytes32 id, ICourt.Case memory c, address accused, uint256 seed) private {
        if (block.timestamp < c.until && seed % 3 == 0 && c.round < 2) {
            require(token.transfer(accused, BOND));
            vm.prank(accused);
            try court.appeal(id) {
                _checkSeats(id);
            } catch (bytes memory refusal) {
                eq(bytes32(bytes4(refusal)), bytes32(ICourt.NotEnoughValidators.selector), "why it was not heard");
            }
            return;
        }
        if (block.timestamp < c.until) vm.warp(c.until);
        uint256 before = stakeOf(accused);
        court.execute(id);
        uint256 taken = court.caseOf(id).slashed;
        isTrue(taken <= before, "C2: slashed <= stake");
        isTrue(before - stakeOf(accused) >= taken, "C2: taken from the stake");
        eq(++_executions[id], 1, "C1: executed once");
        ++executions;
        slashed += taken;
        vm.expectRevert(
            abi.encodeWithSelector(ICourt.WrongPhase.selector, ICourt.CaseState.CLOSED, block.timestamp + 90 days)
        );
        court.execute(id);
    }

    function _opinion(uint256 word) private view returns (Verdict memory v) {
        // Mostly one guilty outcome, so that quorums come about.
        uint256 kind = word / 16 % 12;
        ICourt.Outcome outcome = kind < 8 ? ICourt.Outcome.IMPROBABLE : ICourt.Outcome(kind % 5);
        v = verdict(_mayLie ? outcome : ICourt.Outcome.PASS);
        if (_mayLie && word / 256 % 8 == 0) v.gaps = OTHER_GAPS;
    }

    function _draw(uint256 seed, uint256 i) private pure returns (uint256) {
        return uint256(keccak256(abi.encode(seed, i)));
    }

    // --------------------------------------------------------------------------------------------------- checks

    function _checkSeats(bytes32 id) private view {
        address[] memory who = members(id);
        for (uint256 i; i < who.length; ++i) {
            isTrue(who[i] != court.commitments(id).provider, "C4: nobody judges its own case");
        }
    }

    function _checkEvidence(bytes32 id, uint256 before, uint256 afterwards) private {
        if (before == afterwards) return;
        eq(uint256(court.caseOf(id).state), uint256(ICourt.CaseState.CLOSED), "C5: when the case closes");
        eq(++_evidenceChanges[id], 1, "C5: once");
    }

    /// @notice What the Court must hold: pools that were not paid out, and bonds of cases that are open.
    function owed() external view returns (uint256 sum) {
        for (uint256 i; i < _ids.length; ++i) {
            ICourt.Case memory c = court.caseOf(_ids[i]);
            sum += uint256(c.pool) - c.paid + uint256(c.bonds) * BOND;
        }
    }

    function held() external view returns (uint256) {
        return token.balanceOf(address(court));
    }

    function providerStake(uint256 i) external view returns (uint256) {
        return stakeOf(provider(i));
    }
}

/// @notice C1 to C5, after any sequence of the handler's actions.
contract CourtInvariantsTest is Checks {
    CourtHandler private handler;

    function setUp() public {
        handler = new CourtHandler(true);
    }

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    function targetSelectors() external view returns (FuzzSelector[] memory targets) {
        bytes4[] memory selectors = new bytes4[](6);
        selectors[0] = CourtHandler.openCase.selector;
        selectors[1] = CourtHandler.advance.selector;
        selectors[2] = CourtHandler.wait.selector;
        selectors[3] = CourtHandler.restake.selector;
        selectors[4] = CourtHandler.compensate.selector;
        // Twice as often as the others: a case takes several steps.
        selectors[5] = CourtHandler.advance.selector;
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(handler), selectors);
    }

    /// @notice C1, C2, C4 and C5 are checked in the handler's actions; this one is exact.
    function invariant_C1_C2_C3_C4_C5_poolsAndBondsAreHeld() external view {
        eq(handler.held(), handler.owed(), "C3: balance");
    }
}

/// @notice C6, after any sequence of actions in which every member that votes finds honest work honest.
contract CourtHonestTest is Checks {
    CourtHandler private handler;

    function setUp() public {
        handler = new CourtHandler(false);
    }

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    function targetSelectors() external view returns (FuzzSelector[] memory targets) {
        bytes4[] memory selectors = new bytes4[](3);
        selectors[0] = CourtHandler.openCase.selector;
        selectors[1] = CourtHandler.advance.selector;
        selectors[2] = CourtHandler.wait.selector;
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(handler), selectors);
    }

    /// @notice C6: nobody who served honestly loses anything, whoever stays away and whatever lapses.
    function invariant_C6_theHonestAreNeverSlashed() external view {
        eq(handler.executions(), 0, "C6: no execution");
        eq(handler.providerStake(0), 10_000, "C6: stake");
        for (uint256 i = 1; i < handler.PROVIDERS(); ++i) {
            eq(handler.providerStake(i), 1_000, "C6: stake");
        }
    }
}
