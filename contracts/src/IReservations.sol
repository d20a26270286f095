// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title Reservations: rights to a provider's compute, sold ahead by the period, held and passed on like a ticket.
/// @notice Capacity is counted in micro-STE per second (a millionth of a standard token equivalent each second). Time
/// is cut into periods of equal length, the same for everybody: period p lasts from p * periodSeconds to
/// (p + 1) * periodSeconds, Unix time. A right covers whole periods, so a counter per period is all it takes to know
/// what is sold at any instant.
///
/// Assumptions, stated where the promise is made:
/// - At no instant are more micro-STE per second sold than the provider states as its capacity: a purchase adds to the
///   counter of each period it covers and is refused when one would pass the capacity, and the capacity cannot be
///   lowered below a counter of a period that is not over.
/// - The price is escrowed whole and becomes the provider's second by second. Whether the provider served cannot be
///   proved here. What protects the holder: nothing is paid ahead of time, and it may quit with a notice that the
///   provider published and the right carries (`notice` periods), so what non-service can cost is bounded by what that
///   notice costs. A provider that cannot serve releases the right and the unearned rest goes back at once.
/// - Jobs are paid through the Escrow as ever; a right frees them of the congestion multiplier and says how much fits.
/// - The token is TallyToken or behaves like it (see ITallyToken). No other contract is ever called.
/// - No owner, no pause, no upgrade: nobody can stop a refund, a transfer or a claim.
interface IReservations {
    /// @notice What a provider sells for one profile, in one storage slot.
    /// @param capacity Micro-STE per second that may be sold at any instant.
    /// @param price Wei per STE, that is for one STE per second held for one second.
    /// @param minPeriods Fewest periods of one purchase, and the notice that its holder may quit with.
    /// @param maxPeriods Most periods of one purchase; zero sells nothing.
    /// @param bookedUntil First period that was never sold.
    struct Capacity {
        uint64 capacity;
        uint96 price;
        uint16 minPeriods;
        uint16 maxPeriods;
        uint40 bookedUntil;
    }

    /// @notice A right. Its price so far unpaid is `perPeriod * (end - start) / periodSeconds - claimed`, rounded down.
    /// @param provider Whose compute it is.
    /// @param profileId Profile it is good for.
    /// @param holder Who may transfer, assign and quit it.
    /// @param sessionKey Client key whose jobs may use it; zero for nobody's.
    /// @param rate Micro-STE per second.
    /// @param start Unix second from which it is good; a period's first.
    /// @param end Unix second from which it is not; earlier than bought when it was released or quit.
    /// @param notice Periods it goes on for when its holder quits.
    /// @param perPeriod Wei for one period.
    /// @param claimed Wei paid out to the provider so far, fee included.
    struct Reservation {
        address provider;
        uint64 rate;
        address holder;
        uint40 start;
        uint40 end;
        uint16 notice;
        address sessionKey;
        uint96 perPeriod;
        bytes32 profileId;
        uint96 claimed;
    }

    /// @notice An ERC-2612 permit over `maxCost` wei, from the caller to this contract.
    struct Permit {
        uint256 deadline;
        uint8 v;
        bytes32 r;
        bytes32 s;
    }

    /// @notice `provider` sells up to `capacity` micro-STE per second of `profileId` from now on.
    event CapacityOffered(
        address indexed provider,
        bytes32 indexed profileId,
        uint64 capacity,
        uint96 price,
        uint16 minPeriods,
        uint16 maxPeriods
    );

    /// @notice A right was sold for `cost` wei, all of it escrowed.
    event Bought(
        bytes32 indexed id,
        address indexed provider,
        bytes32 indexed profileId,
        uint64 rate,
        uint256 start,
        uint256 end,
        uint256 cost
    );

    /// @notice The right is `to`'s; `from` zero when it was bought.
    event Transferred(bytes32 indexed id, address indexed from, address indexed to);

    /// @notice Jobs of `sessionKey` may use the right; zero for nobody's.
    event Assigned(bytes32 indexed id, address indexed sessionKey);

    /// @notice The right ends at `end`, earlier than before, and `refund` wei went back to `holder`.
    event Shortened(bytes32 indexed id, address indexed by, address indexed holder, uint256 end, uint256 refund);

    /// @notice `paid` wei became the provider's, `fee` of them burned and the rest sent.
    event Claimed(address indexed provider, uint256 paid, uint256 fee);

    /// @notice A period of `seconds_` seconds is none, or longer than `maximum`.
    error PeriodOutOfRange(uint256 seconds_, uint256 maximum);
    /// @notice Terms of `minPeriods` to `maxPeriods` periods cannot be kept: none, or beyond the `horizon`.
    error TermsOutOfRange(uint256 minPeriods, uint256 maxPeriods, uint256 horizon);
    /// @notice In `period` more is sold already than the `capacity` asked for.
    error SoldAlready(uint256 period, uint256 sold, uint256 capacity);
    /// @notice A rate of zero.
    error ZeroRate();
    /// @notice One purchase covers `minPeriods` to `maxPeriods` periods (zero: none are sold), not `periods`.
    error TermNotSold(uint256 periods, uint256 minPeriods, uint256 maxPeriods);
    /// @notice Periods from `first` up to `last` cannot be bought now: sold are those from `earliest` to `latest`.
    error OutsideHorizon(uint256 first, uint256 last, uint256 earliest, uint256 latest);
    /// @notice In `period` only `free` micro-STE per second are left.
    error SoldOut(uint256 period, uint256 rate, uint256 free);
    /// @notice It costs `cost` wei and at most `maxCost` were to be paid.
    error CostAbove(uint256 cost, uint256 maxCost);
    /// @notice `caller` is not the `holder`.
    error NotHolder(address caller, address holder);
    /// @notice `caller` is not the `provider`.
    error NotProvider(address caller, address provider);
    /// @notice The zero address can hold nothing.
    error ZeroHolder();
    /// @notice The right ends at `end` anyway; ending it now would end it at `earliest`.
    error EndsAnyway(uint256 end, uint256 earliest);

    /// @notice State what the caller sells for `profileId`. What was sold stays sold on its own terms.
    /// @dev The capacity may be lowered only as far as every period that is not over allows; `maxPeriods` zero stops
    /// sales at once.
    /// @param capacity Micro-STE per second.
    /// @param price Wei per STE.
    function offer(bytes32 profileId, uint64 capacity, uint96 price, uint16 minPeriods, uint16 maxPeriods) external;

    /// @notice Buy `rate` micro-STE per second over `periods` periods from period `first` on; the caller holds it.
    /// @dev The running period may be bought and is paid whole. Costs are rounded up to a wei for each period.
    /// @param sessionKey Whose jobs may use it; zero to assign it later.
    /// @param maxCost Most wei the caller pays, whatever the provider's price became meanwhile.
    /// @return id Names the right for ever; it follows from buyer, count of its purchases and terms, so no reorg gives
    /// it to another.
    function buy(
        address provider,
        bytes32 profileId,
        uint64 rate,
        uint40 first,
        uint16 periods,
        address sessionKey,
        uint96 maxCost
    ) external returns (bytes32 id);

    /// @notice `buy`, the allowance of `maxCost` wei given by a permit. A permit that was used before is no error.
    function buyWithPermit(
        address provider,
        bytes32 profileId,
        uint64 rate,
        uint40 first,
        uint16 periods,
        address sessionKey,
        uint96 maxCost,
        Permit calldata permit
    ) external returns (bytes32 id);

    /// @notice Give the right to `to`. Its session key is cleared: the new holder assigns its own.
    function transfer(bytes32 id, address to) external;

    /// @notice Let jobs of `sessionKey` use the right, instead of those of another.
    function assign(bytes32 id, address sessionKey) external;

    /// @notice As its provider, end a right now. The unearned rest goes to the holder, its later periods are free again.
    /// @return refund Wei sent to the holder.
    function release(bytes32 id) external returns (uint256 refund);

    /// @notice As its holder, end a right after its notice, counted from the next period's start or its own.
    /// @return refund Wei sent to the holder: what the periods given back cost.
    function quit(bytes32 id) external returns (uint256 refund);

    /// @notice Send `provider` what it earned by now with the rights `ids`, less the fee, which is burned. Anybody may
    /// call; the money always goes to the provider. Rights of others, unknown ones and repetitions pay nothing.
    /// @return paid Wei, fee included.
    function claim(address provider, bytes32[] calldata ids) external returns (uint256 paid);

    /// @notice Length of a period. Seconds.
    function periodSeconds() external view returns (uint256);

    /// @notice What `provider` sells; all zero when nothing.
    function capacityOf(address provider, bytes32 profileId) external view returns (Capacity memory);

    /// @notice Micro-STE per second sold in a period.
    function soldIn(address provider, bytes32 profileId, uint256 period) external view returns (uint64);

    /// @notice A right by its id; all zero when there is none.
    function reservation(bytes32 id) external view returns (Reservation memory);

    /// @notice Wei that the provider has earned with a right by now and not claimed, fee included.
    function claimable(bytes32 id) external view returns (uint256);
}
