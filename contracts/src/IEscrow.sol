// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title Escrow: prepaid one-way channels, settled by cumulative vouchers.
/// @notice A channel is (provider, session signer). The session key signs Voucher{provider, cumulative} off chain; the
/// provider settles the highest one it holds whenever it likes. Nothing is written on chain per request.
///
/// Assumptions, stated where the promise is made:
/// - A voucher is never revoked and never expires; amounts are cumulative for the channel's whole life, across exits.
///   A voucher above the deposit stays good for what is deposited later.
/// - A provider serves only against `deposit - claimed` of a channel whose `exitAt` is zero, and settles within
///   `exitDelay` of an `ExitRequested`; a later voucher may find the channel empty.
/// - Whoever holds the session key can spend the channel's deposit, with this provider only, and nothing else.
/// - The token is TallyToken or behaves like it (see ITallyToken). No other contract is ever called.
/// - No owner, no pause, no upgrade: nobody can stop an exit or a settlement.
interface IEscrow {
    /// @notice A channel's money in one storage slot; amounts are totals in wei that never fall, except `deposit`,
    /// which an exit lowers to `claimed`.
    /// @param deposit Wei put in over the channel's life, minus what exits took back.
    /// @param claimed Wei paid to the provider over the channel's life, fee included; never above `deposit`.
    /// @param exitAt Unix second from which the owner may exit; zero when no exit is requested.
    struct Channel {
        uint96 deposit;
        uint96 claimed;
        uint40 exitAt;
    }

    /// @notice An ERC-2612 permit over exactly the deposited amount, from the caller to the Escrow.
    struct Permit {
        uint256 deadline;
        uint8 v;
        bytes32 r;
        bytes32 s;
    }

    /// @notice `owner` opened the channel and put `amount` wei into it.
    event ChannelOpened(address indexed provider, address indexed signer, address indexed owner, uint256 amount);

    /// @notice The deposit rose by `amount` wei to `deposit`.
    event ToppedUp(address indexed provider, address indexed signer, uint256 amount, uint256 deposit);

    /// @notice One batch paid `paid` wei, of which `fee` wei wait to be burned and the rest is the provider's.
    /// @param claims One word per voucher that paid: signer in the upper 160 bits, the channel's new `claimed` in the
    /// lower 96. One event a batch costs 259 gas a pair where an event a pair would cost over 1,500.
    event Settled(address indexed provider, uint256 paid, uint256 fee, uint256[] claims);

    /// @notice The owner may exit from `exitAt` on.
    event ExitRequested(address indexed provider, address indexed signer, uint256 exitAt);

    /// @notice The owner withdrew the request; the channel is good again.
    event ExitCancelled(address indexed provider, address indexed signer);

    /// @notice The owner took back `refund` wei; deposit now equals claimed.
    event Exited(address indexed provider, address indexed signer, uint256 refund);

    /// @notice `amount` wei went to the provider's wallet.
    event Collected(address indexed provider, uint256 amount);

    /// @notice `amount` wei of fees were destroyed.
    event FeesBurned(uint256 amount);

    /// @notice The exit delay must be in (0, maximum].
    error ExitDelayOutOfRange(uint256 exitDelay, uint256 maximum);
    /// @notice The consent was good until `deadline`.
    error ConsentExpired(uint256 deadline, uint256 nowSeconds);
    /// @notice The consent is not signed by `signer` but by `recovered` (zero: by nobody).
    error BadConsent(address signer, address recovered);
    /// @notice The channel already belongs to `owner`.
    error ChannelTaken(address provider, address signer, address owner);
    /// @notice `caller` is not `owner`, the channel's (zero: no such channel).
    error NotChannelOwner(address caller, address owner);
    /// @notice Neither party of a channel is the zero address.
    error ZeroParty(address provider, address signer);
    /// @notice An amount of zero.
    error ZeroAmount();
    /// @notice The slot has room for `room` wei more, not for `amount`.
    error DepositTooLarge(uint256 amount, uint256 room);
    /// @notice An exit is pending since it was requested; cancel it first.
    error ExitPending(uint256 exitAt);
    /// @notice No exit was requested.
    error NoExitRequested();
    /// @notice The exit is possible from `exitAt` on.
    error ExitTooEarly(uint256 exitAt, uint256 nowSeconds);
    /// @notice The batch is `length` bytes, no multiple of `voucherBytes`.
    error MalformedBatch(uint256 length, uint256 voucherBytes);

    /// @notice Open a channel to `provider` that `signer` spends from, with `amount` wei of the caller's.
    /// @dev The signature makes it the session key's will, so nobody can take (provider, signer) by being first.
    /// @param deadline Unix second after which the consent is void.
    /// @param consentSig 65 bytes r || s || v, low s, of `signer` over SessionConsent{owner: caller, provider, deadline}.
    function open(address provider, address signer, uint256 amount, uint64 deadline, bytes calldata consentSig) external;

    /// @notice `open`, with the allowance given by a permit. A permit that was already used is no error as long as
    /// the allowance suffices, so front-running it gains nothing.
    function openWithPermit(
        address provider,
        address signer,
        uint256 amount,
        uint64 deadline,
        bytes calldata consentSig,
        Permit calldata permit
    ) external;

    /// @notice Put `amount` wei more into the caller's channel; also how a channel comes back after its exit.
    function topUp(address provider, address signer, uint256 amount) external;

    /// @notice Pay `provider` what each voucher raises its channel by: min(cumulative, deposit) - claimed.
    /// @dev Permissionless and idempotent: whoever sends it, the money is the provider's. An item that is stale,
    /// forged, malleable or unfunded is skipped; it never reverts the batch. The fee is taken once, from the batch's
    /// sum, rounded down: never more than 12 %, and splitting a batch saves the provider less than one wei each time.
    /// @param vouchers Items of 76 bytes: r (32), s with v - 27 in the top bit (32, EIP-2098), cumulative (12).
    /// @return paid Wei paid by all channels together, fee included.
    function settle(address provider, bytes calldata vouchers) external returns (uint256 paid);

    /// @notice Start the exit delay of the caller's channel; vouchers still settle until `exit`.
    function requestExit(address provider, address signer) external;

    /// @notice Withdraw the request. Only the owner, so nobody can hold a deposit captive.
    function cancelExit(address provider, address signer) external;

    /// @notice Take back what no voucher claimed, once the delay has passed.
    /// @dev Depends on no contract but the token. `claimed` stays, so an old voucher pays nothing again.
    /// @return refund Wei returned to the caller.
    function exit(address provider, address signer) external returns (uint256 refund);

    /// @notice Send `provider` what it earned. Anybody may call; the money always goes to the provider.
    /// @return amount Wei sent, possibly zero.
    function collect(address provider) external returns (uint256 amount);

    /// @notice Destroy the fees that settlements set aside. Anybody may call.
    /// @return amount Wei burned, possibly zero.
    function burnFees() external returns (uint256 amount);

    /// @notice Seconds between requestExit and exit.
    function exitDelay() external view returns (uint256);

    /// @notice The channel's slot; all zero when it was never opened.
    function channel(address provider, address signer) external view returns (Channel memory);

    /// @notice Whose deposit it is; zero when the channel was never opened. Kept after an exit.
    function ownerOf(address provider, address signer) external view returns (address);

    /// @notice What a provider has earned after fees.
    /// @return pending Wei that `collect` would send now.
    /// @return collected Wei sent so far.
    function earnedOf(address provider) external view returns (uint128 pending, uint128 collected);

    /// @notice The protocol's fees.
    /// @return pending Wei that `burnFees` would burn now.
    /// @return burned Wei burned so far; what Emissions may mint is bounded by it.
    function fees() external view returns (uint128 pending, uint128 burned);

    /// @notice EIP-712 domain separator on this chain, also after a fork changed the chain id.
    function domainSeparator() external view returns (bytes32);
}
