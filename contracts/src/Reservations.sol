// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {SafeTransferLib} from "solady/utils/SafeTransferLib.sol";
import {IReservations} from "./IReservations.sol";
import {ITallyToken} from "./ITallyToken.sol";

/// @title Reservations, as promised in IReservations.
contract Reservations is IReservations {
    using SafeTransferLib for address;

    /// @notice Protocol fee in basis points of what a claim pays: 12 %, burned, as in the Escrow.
    uint256 public constant FEE_BPS = 1_200;

    /// @notice How far ahead is sold. Periods, the running one included. It bounds every loop here; doubling it doubles
    /// the gas of lowering a capacity that is booked to the end (128 slots, some 300,000 gas).
    uint256 public constant HORIZON = 512;

    /// @notice Longest period a deployment may choose. Seconds. Doubling it doubles the least that can be bought.
    uint256 public constant MAX_PERIOD = 30 days;

    uint256 private constant BPS = 10_000;
    uint256 private constant MICRO = 1_000_000;
    /// @dev Counters of this many periods share a storage slot.
    uint256 private constant PACKED = 4;

    /// @notice What rights are paid in.
    ITallyToken public immutable token;

    /// @inheritdoc IReservations
    uint256 public immutable periodSeconds;

    /// @dev One provider's sales for one profile; `sold[p / PACKED][p % PACKED]` is period p's counter.
    struct Book {
        Capacity terms;
        mapping(uint256 group => uint64[PACKED]) sold;
    }

    mapping(address provider => mapping(bytes32 profileId => Book)) private _books;
    mapping(bytes32 id => Reservation) private _reservations;
    mapping(address buyer => uint256) private _purchases;

    /// @param token_ TallyToken.
    /// @param periodSeconds_ Length of a period.
    constructor(ITallyToken token_, uint256 periodSeconds_) {
        if (periodSeconds_ == 0 || periodSeconds_ > MAX_PERIOD) revert PeriodOutOfRange(periodSeconds_, MAX_PERIOD);
        token = token_;
        periodSeconds = periodSeconds_;
    }

    /// @inheritdoc IReservations
    function offer(bytes32 profileId, uint64 capacity, uint96 price, uint16 minPeriods, uint16 maxPeriods) external {
        if (minPeriods == 0 || maxPeriods > HORIZON || (maxPeriods != 0 && maxPeriods < minPeriods)) {
            revert TermsOutOfRange(minPeriods, maxPeriods, HORIZON);
        }
        Book storage book = _books[msg.sender][profileId];
        Capacity memory terms = book.terms;
        if (capacity < terms.capacity) {
            for (uint256 period = _period(); period < terms.bookedUntil; period++) {
                uint64 sold = book.sold[period / PACKED][period % PACKED];
                if (sold > capacity) revert SoldAlready(period, sold, capacity);
            }
        }
        book.terms = Capacity(capacity, price, minPeriods, maxPeriods, terms.bookedUntil);
        emit CapacityOffered(msg.sender, profileId, capacity, price, minPeriods, maxPeriods);
    }

    /// @inheritdoc IReservations
    function buy(
        address provider,
        bytes32 profileId,
        uint64 rate,
        uint40 first,
        uint16 periods,
        address sessionKey,
        uint96 maxCost
    ) external returns (bytes32 id) {
        return _buy(provider, profileId, rate, first, periods, sessionKey, maxCost);
    }

    /// @inheritdoc IReservations
    function buyWithPermit(
        address provider,
        bytes32 profileId,
        uint64 rate,
        uint40 first,
        uint16 periods,
        address sessionKey,
        uint96 maxCost,
        Permit calldata permit
    ) external returns (bytes32 id) {
        try token.permit(msg.sender, address(this), maxCost, permit.deadline, permit.v, permit.r, permit.s) {} catch {}
        return _buy(provider, profileId, rate, first, periods, sessionKey, maxCost);
    }

    /// @inheritdoc IReservations
    function transfer(bytes32 id, address to) external {
        if (to == address(0)) revert ZeroHolder();
        Reservation storage right = _held(id);
        right.holder = to;
        right.sessionKey = address(0);
        emit Transferred(id, msg.sender, to);
    }

    /// @inheritdoc IReservations
    function assign(bytes32 id, address sessionKey) external {
        _held(id).sessionKey = sessionKey;
        emit Assigned(id, sessionKey);
    }

    /// @inheritdoc IReservations
    function release(bytes32 id) external returns (uint256 refund) {
        Reservation storage right = _reservations[id];
        if (msg.sender != right.provider) revert NotProvider(msg.sender, right.provider);
        return _shorten(id, right, block.timestamp < right.start ? right.start : block.timestamp);
    }

    /// @inheritdoc IReservations
    function quit(bytes32 id) external returns (uint256 refund) {
        Reservation storage right = _held(id);
        uint256 from = (_period() + 1) * periodSeconds;
        if (from < right.start) from = right.start;
        return _shorten(id, right, from + right.notice * periodSeconds);
    }

    /// @inheritdoc IReservations
    function claim(address provider, bytes32[] calldata ids) external returns (uint256 paid) {
        for (uint256 i = 0; i < ids.length; i++) {
            Reservation storage right = _reservations[ids[i]];
            if (right.provider != provider) continue;
            uint256 amount = _claimable(right);
            // At most what the right cost, which fits uint96.
            right.claimed += uint96(amount);
            paid += amount;
        }
        if (paid == 0) return 0;
        uint256 feeDown = paid * FEE_BPS / BPS;
        emit Claimed(provider, paid, feeDown);
        token.burn(feeDown);
        address(token).safeTransfer(provider, paid - feeDown);
    }

    /// @inheritdoc IReservations
    function capacityOf(address provider, bytes32 profileId) external view returns (Capacity memory) {
        return _books[provider][profileId].terms;
    }

    /// @inheritdoc IReservations
    function soldIn(address provider, bytes32 profileId, uint256 period) external view returns (uint64) {
        return _books[provider][profileId].sold[period / PACKED][period % PACKED];
    }

    /// @inheritdoc IReservations
    function reservation(bytes32 id) external view returns (Reservation memory) {
        return _reservations[id];
    }

    /// @inheritdoc IReservations
    function claimable(bytes32 id) external view returns (uint256) {
        return _claimable(_reservations[id]);
    }

    function _buy(
        address provider,
        bytes32 profileId,
        uint64 rate,
        uint40 first,
        uint16 periods,
        address sessionKey,
        uint96 maxCost
    ) private returns (bytes32 id) {
        Reservation memory right = Reservation({
            provider: provider,
            rate: rate,
            holder: msg.sender,
            start: uint40(first * periodSeconds),
            end: uint40((uint256(first) + periods) * periodSeconds),
            notice: 0,
            sessionKey: sessionKey,
            perPeriod: 0,
            profileId: profileId,
            claimed: 0
        });
        (right.perPeriod, right.notice) = _book(provider, profileId, rate, first, periods, maxCost);
        uint256 cost = uint256(right.perPeriod) * periods;
        uint256 nonce = _purchases[msg.sender]++;
        id = keccak256(
            abi.encode(
                block.chainid, address(this), msg.sender, nonce, provider, profileId, rate, right.start, right.end
            )
        );
        _reservations[id] = right;
        emit Bought(id, provider, profileId, rate, right.start, right.end, cost);
        emit Transferred(id, address(0), msg.sender);
        emit Assigned(id, sessionKey);
        address(token).safeTransferFrom(msg.sender, address(this), cost);
    }

    /// @dev Count a purchase in every period it covers. Nothing is sold beyond the capacity, in any of them.
    function _book(address provider, bytes32 profileId, uint64 rate, uint256 first, uint256 periods, uint256 maxCost)
        private
        returns (uint96 perPeriod, uint16 notice)
    {
        Book storage book = _books[provider][profileId];
        Capacity memory terms = book.terms;
        if (rate == 0) revert ZeroRate();
        if (periods == 0 || periods < terms.minPeriods || periods > terms.maxPeriods) {
            revert TermNotSold(periods, terms.minPeriods, terms.maxPeriods);
        }
        uint256 last = first + periods;
        uint256 earliest = _period();
        if (first < earliest || last > earliest + HORIZON) {
            revert OutsideHorizon(first, last, earliest, earliest + HORIZON);
        }
        uint256 perPeriodUp = (rate * periodSeconds * terms.price + MICRO - 1) / MICRO;
        if (perPeriodUp * periods > maxCost) revert CostAbove(perPeriodUp * periods, maxCost);
        for (uint256 period = first; period < last; period++) {
            uint64[PACKED] storage group = book.sold[period / PACKED];
            uint64 sold = group[period % PACKED];
            if (rate > terms.capacity - sold) revert SoldOut(period, rate, terms.capacity - sold);
            group[period % PACKED] = sold + rate;
        }
        if (last > terms.bookedUntil) book.terms.bookedUntil = uint40(last);
        return (uint96(perPeriodUp), terms.minPeriods);
    }

    /// @dev Let a right end at `end` and send its holder what the rest cost. The period that `end` lies in stays
    /// counted as sold.
    function _shorten(bytes32 id, Reservation storage right, uint256 end) private returns (uint256 refund) {
        uint256 before = right.end;
        if (end >= before) revert EndsAnyway(before, end);
        mapping(uint256 group => uint64[PACKED]) storage sold = _books[right.provider][right.profileId].sold;
        for (uint256 period = (end + periodSeconds - 1) / periodSeconds; period < before / periodSeconds; period++) {
            sold[period / PACKED][period % PACKED] -= right.rate;
        }
        refund = _due(right, before) - _due(right, end);
        right.end = uint40(end);
        emit Shortened(id, msg.sender, right.holder, end, refund);
        address(token).safeTransfer(right.holder, refund);
    }

    function _held(bytes32 id) private view returns (Reservation storage right) {
        right = _reservations[id];
        if (msg.sender != right.holder) revert NotHolder(msg.sender, right.holder);
    }

    function _claimable(Reservation storage right) private view returns (uint256) {
        uint256 until = block.timestamp < right.end ? block.timestamp : right.end;
        return until <= right.start ? 0 : _due(right, until) - right.claimed;
    }

    /// @dev Wei that the time from the start up to `until` costs, rounded down.
    function _due(Reservation storage right, uint256 until) private view returns (uint256 earnedDown) {
        return right.perPeriod * (until - right.start) / periodSeconds;
    }

    /// @dev The running period.
    function _period() private view returns (uint256) {
        return block.timestamp / periodSeconds;
    }
}
