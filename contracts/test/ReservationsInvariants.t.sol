// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IReservations} from "../src/IReservations.sol";
import {Reservations} from "../src/Reservations.sol";
import {TallyToken} from "../src/TallyToken.sol";
import {ReservationsFixture} from "./ReservationsFixture.sol";
import {Checks, vm} from "./Vm.sol";

/// @notice Two providers, three traders, time that passes: every purchase, transfer, end and claim forge can think of.
/// @dev Every action is valid for the state it meets (fail_on_revert), or is checked to be refused.
contract ReservationsHandler is Checks {
    uint256 public constant PROVIDERS = 2;
    uint256 public constant TRADERS = 3;
    bytes32 public constant PROFILE = keccak256("profile");
    /// @dev Periods a purchase may begin ahead.
    uint256 private constant AHEAD = 6;

    Reservations private immutable _reservations;
    TallyToken private immutable _token;
    uint256 private immutable _length;

    bytes32[] public ids;
    /// @notice Who should hold each right, by this handler's own books, and what its provider has claimed of it.
    mapping(bytes32 id => address) public holders;
    mapping(bytes32 id => uint256) public seenClaimed;
    /// @notice Totals over everything that happened.
    uint256 public bought;
    uint256 public refunded;
    uint256 public paid;
    uint256 public donated;
    /// @notice Periods that were ever sold lie in [first, last).
    uint256 public first;
    uint256 public last;

    constructor(Reservations reservations, TallyToken token) {
        _reservations = reservations;
        _token = token;
        _length = reservations.periodSeconds();
        (first, last) = (block.timestamp / _length, block.timestamp / _length);
        for (uint256 i = 0; i < TRADERS; i++) {
            vm.prank(trader(i));
            token.approve(address(reservations), type(uint256).max);
        }
    }

    function provider(uint256 i) public pure returns (address) {
        return address(uint160(0xB0B00 + i % PROVIDERS));
    }

    function trader(uint256 i) public pure returns (address) {
        return address(uint160(0xA11CE00 + i % TRADERS));
    }

    function count() external view returns (uint256) {
        return ids.length;
    }

    function offer(uint256 p, uint256 capacity, uint256 price, uint256 least, uint256 most) external {
        uint256 floor = peak(provider(p));
        uint64 wanted = uint64(floor + capacity % 1_000);
        least = bound(least, 1, 4);
        most = most % 5 == 0 ? 0 : bound(most, least, 12);
        vm.prank(provider(p));
        _reservations.offer(PROFILE, wanted, uint96(price % 1_000_000), uint16(least), uint16(most));
        if (floor == 0) return;
        // R2: the capacity cannot fall below what is sold.
        vm.prank(provider(p));
        try _reservations.offer(PROFILE, uint64(floor - 1), 1, 1, 1) {
            revert Unexpected();
        } catch {}
    }

    function buy(uint256 p, uint256 t, uint256 rate, uint256 ahead, uint256 periods, uint256 key) external {
        IReservations.Capacity memory terms = _reservations.capacityOf(provider(p), PROFILE);
        if (terms.maxPeriods == 0) return;
        uint40 from = uint40(block.timestamp / _length + ahead % AHEAD);
        uint16 term = uint16(bound(periods, terms.minPeriods, terms.maxPeriods));
        uint256 free = terms.capacity;
        for (uint256 i = from; i < uint256(from) + term; i++) {
            uint256 sold = _reservations.soldIn(provider(p), PROFILE, i);
            if (terms.capacity - sold < free) free = terms.capacity - sold;
        }
        if (rate % 4 == 0) {
            // R2: not one micro-STE beyond what is free.
            vm.prank(trader(t));
            try _reservations.buy(provider(p), PROFILE, uint64(free + 1), from, term, address(0), type(uint96).max) {
                revert Unexpected();
            } catch {}
        }
        if (free == 0) return;
        uint64 wanted = uint64(bound(rate, 1, free));
        uint256 before = _token.balanceOf(trader(t));
        vm.prank(trader(t));
        bytes32 id =
            _reservations.buy(provider(p), PROFILE, wanted, from, term, address(uint160(key)), type(uint96).max);
        isTrue(holders[id] == address(0), "R4: an id names one right");
        ids.push(id);
        holders[id] = trader(t);
        bought += before - _token.balanceOf(trader(t));
        if (from + term > last) last = from + term;
    }

    function transfer(uint256 which, uint256 to) external {
        if (ids.length == 0) return;
        bytes32 id = ids[which % ids.length];
        vm.prank(holders[id]);
        _reservations.transfer(id, trader(to));
        holders[id] = trader(to);
    }

    /// @dev R4: whoever does not hold it can do nothing with it.
    function steal(uint256 which, uint256 by) external {
        if (ids.length == 0) return;
        bytes32 id = ids[which % ids.length];
        address thief = by % 2 == 0 ? trader(by / 2) : provider(by / 2);
        if (thief == holders[id]) return;
        bytes memory refusal = abi.encodeWithSelector(IReservations.NotHolder.selector, thief, holders[id]);
        vm.expectRevert(refusal);
        vm.prank(thief);
        _reservations.transfer(id, thief);
        vm.expectRevert(refusal);
        vm.prank(thief);
        _reservations.assign(id, thief);
        vm.expectRevert(refusal);
        vm.prank(thief);
        _reservations.quit(id);
    }

    function assign(uint256 which, uint256 key) external {
        if (ids.length == 0) return;
        bytes32 id = ids[which % ids.length];
        vm.prank(holders[id]);
        _reservations.assign(id, address(uint160(key)));
    }

    function release(uint256 which) external {
        if (ids.length == 0) return;
        bytes32 id = ids[which % ids.length];
        IReservations.Reservation memory right = _reservations.reservation(id);
        uint256 end = block.timestamp < right.start ? right.start : block.timestamp;
        if (end >= right.end) return;
        vm.prank(right.provider);
        refunded += _reservations.release(id);
    }

    function quit(uint256 which) external {
        if (ids.length == 0) return;
        bytes32 id = ids[which % ids.length];
        IReservations.Reservation memory right = _reservations.reservation(id);
        uint256 from = (block.timestamp / _length + 1) * _length;
        if (from < right.start) from = right.start;
        if (from + right.notice * _length >= right.end) return;
        vm.prank(holders[id]);
        refunded += _reservations.quit(id);
    }

    /// @dev All rights at once, those of the other provider among them.
    function claim(uint256 p) external {
        paid += _reservations.claim(provider(p), ids);
        for (uint256 i = 0; i < ids.length; i++) {
            uint256 claimed = _reservations.reservation(ids[i]).claimed;
            isTrue(claimed >= seenClaimed[ids[i]], "R3: claimed is monotone");
            seenClaimed[ids[i]] = claimed;
        }
    }

    function pass(uint256 seconds_) external {
        vm.warp(block.timestamp + seconds_ % (2 * _length));
    }

    function donate(uint256 t, uint256 amount) external {
        amount = amount % 1_000;
        vm.prank(trader(t));
        require(_token.transfer(address(_reservations), amount));
        donated += amount;
    }

    /// @dev Most sold in any period that is not over.
    function peak(address who) private view returns (uint256 most) {
        for (uint256 i = block.timestamp / _length; i < last; i++) {
            uint256 sold = _reservations.soldIn(who, PROFILE, i);
            if (sold > most) most = sold;
        }
    }
}

/// @notice What was to be refused was not.
error Unexpected();

/// @notice R1 to R4, after any sequence of the handler's actions.
contract ReservationsInvariantsTest is ReservationsFixture {
    ReservationsHandler private handler;

    function setUp() public {
        vm.warp(1_000 * PERIOD);
        handler = new ReservationsHandler(reservations, token);
        for (uint256 i = 0; i < handler.TRADERS(); i++) {
            require(token.transfer(handler.trader(i), SUPPLY / 4));
        }
    }

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    function targetSelectors() external view returns (FuzzSelector[] memory targets) {
        bytes4[] memory selectors = new bytes4[](10);
        selectors[0] = ReservationsHandler.offer.selector;
        selectors[1] = ReservationsHandler.buy.selector;
        selectors[2] = ReservationsHandler.transfer.selector;
        selectors[3] = ReservationsHandler.steal.selector;
        selectors[4] = ReservationsHandler.assign.selector;
        selectors[5] = ReservationsHandler.release.selector;
        selectors[6] = ReservationsHandler.quit.selector;
        selectors[7] = ReservationsHandler.claim.selector;
        selectors[8] = ReservationsHandler.pass.selector;
        selectors[9] = ReservationsHandler.donate.selector;
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(handler), selectors);
    }

    /// @notice R1: balance >= sum of what rights cost and is unpaid; here exactly, donations aside. And what was paid
    /// in is what was paid out, what was given back, and what is held.
    function invariant_R1_solvent() external view {
        uint256 owed = 0;
        for (uint256 i = 0; i < handler.count(); i++) {
            IReservations.Reservation memory right = reservations.reservation(handler.ids(i));
            owed += right.perPeriod * (right.end - right.start) / PERIOD - right.claimed;
        }
        eq(token.balanceOf(address(reservations)), owed + handler.donated(), "R1: balance");
        eq(handler.bought(), owed + handler.paid() + handler.refunded(), "R1: money is conserved");
    }

    /// @notice R2: in no period is more sold than the capacity, and a period's counter covers the rights good at any
    /// of its instants.
    function invariant_R2_neverOversold() external view {
        for (uint256 p = 0; p < handler.PROVIDERS(); p++) {
            address provider = handler.provider(p);
            uint256 capacity = reservations.capacityOf(provider, PROFILE).capacity;
            for (uint256 i = handler.first(); i < handler.last(); i++) {
                uint256 sold = reservations.soldIn(provider, PROFILE, i);
                if (i >= block.timestamp / PERIOD) isTrue(sold <= capacity, "R2: sold <= capacity");
                eq(sold, promised(provider, i), "R2: sold is what rights promise");
            }
        }
    }

    /// @notice R3: nothing is paid before it is earned.
    function invariant_R3_paidAsTimePasses() external view {
        for (uint256 i = 0; i < handler.count(); i++) {
            IReservations.Reservation memory right = reservations.reservation(handler.ids(i));
            uint256 until = block.timestamp < right.end ? block.timestamp : right.end;
            uint256 earned = until <= right.start ? 0 : right.perPeriod * (until - right.start) / PERIOD;
            isTrue(right.claimed <= earned, "R3: claimed <= earned");
        }
    }

    /// @notice R4: a right is held by whoever bought it or was given it by its holder.
    function invariant_R4_onlyItsHolderMovesIt() external view {
        for (uint256 i = 0; i < handler.count(); i++) {
            bytes32 id = handler.ids(i);
            eq(reservations.reservation(id).holder, handler.holders(id), "R4: holder");
        }
    }

    /// @dev Micro-STE per second of all rights that are good at some instant of a period, or were.
    function promised(address provider, uint256 period_) private view returns (uint256 sum) {
        for (uint256 i = 0; i < handler.count(); i++) {
            IReservations.Reservation memory right = reservations.reservation(handler.ids(i));
            bool covers = right.start < (period_ + 1) * PERIOD && right.end > period_ * PERIOD;
            if (right.provider == provider && covers) sum += right.rate;
        }
    }
}
