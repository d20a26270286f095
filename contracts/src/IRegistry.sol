// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Tariff} from "./Types.sol";

/// @title Registry: who provides, with what stake, signing with which key, at which published price.
///
/// Assumptions, stated where the promise is made:
/// - Every document is signed under the Escrow's EIP-712 domain of this chain.
/// - The Court decides guilt; this contract only bounds what it can take: never more than the stake, once per fault
///   id, split between burning and a bounty. The Court address is fixed for ever; without a contract there nobody is
///   slashed.
/// - A client trusts stake only together with `releaseAt`: unbonding stake stays slashable until it is withdrawn, and
///   the unbonding delay is longer than a fault can take to be found, disputed and judged.
/// - The token is TallyToken or behaves like it (see ITallyToken). No other contract is ever called.
/// - No owner, no pause, no upgrade.
interface IRegistry {
    /// @notice A node key and the time it signed for its wallet. `until` zero: it still does.
    struct NodeKey {
        address wallet;
        uint40 since;
        uint40 until;
    }

    /// @notice Stake in one storage slot. Both parts are slashable.
    /// @param active Wei that count as stake.
    /// @param unbonding Wei asked back, all withdrawable together from `releaseAt` (Unix seconds) on.
    struct Stake {
        uint96 active;
        uint96 unbonding;
        uint40 releaseAt;
    }

    /// @notice A logged tariff in one storage slot: whose, and when it is in force. Unix seconds, [from, until).
    struct TariffEntry {
        address provider;
        uint48 validFrom;
        uint48 validUntil;
    }

    /// @notice `nodeKey` signs for `wallet` from now on.
    event NodeKeySet(address indexed wallet, address indexed nodeKey);

    /// @notice `nodeKey` no longer signs for `wallet`; what it signed before stays attributable.
    event NodeKeyRetired(address indexed wallet, address indexed nodeKey);

    /// @notice Stake rose by `amount` wei to `active`.
    event Staked(address indexed wallet, uint256 amount, uint256 active);

    /// @notice `amount` wei left active stake; all that is unbonding is released at `releaseAt`.
    event UnbondRequested(address indexed wallet, uint256 amount, uint256 releaseAt);

    /// @notice `amount` wei of unbonded stake went back to `wallet`.
    event Withdrawn(address indexed wallet, uint256 amount);

    /// @notice The Court took `taken` wei for `faultId`: `bounty` for `reporter`, the rest burned.
    event Slashed(
        address indexed wallet, bytes32 indexed faultId, address indexed reporter, uint256 taken, uint256 bounty
    );

    /// @notice `amount` wei of bounties went to `reporter`.
    event BountyCollected(address indexed reporter, uint256 amount);

    /// @notice `registrant` says that the Profile with `profileId` is published in the file hashing to `uriHash`.
    event ProfileRegistered(bytes32 indexed profileId, address indexed registrant, bytes32 uriHash);

    /// @notice A tariff was published. The document itself is in the call's input.
    event TariffLogged(
        address indexed provider,
        bytes32 indexed profileId,
        bytes32 indexed tariffHash,
        uint64 sequence,
        uint64 validFrom,
        uint64 validUntil
    );

    /// @notice Unbonding for `unbondDelay` seconds does not outlast the `judgement` a fault can take.
    error UnbondDelayTooShort(uint256 unbondDelay, uint256 judgement);
    /// @notice Unbonding for `unbondDelay` seconds would hold stake longer than `maximum`.
    error UnbondDelayTooLong(uint256 unbondDelay, uint256 maximum);
    /// @notice An epoch of zero seconds.
    error ZeroEpoch();
    /// @notice The zero address cannot be a node key.
    error ZeroNodeKey();
    /// @notice The wallet signs with `nodeKey` already; rotate instead.
    error AlreadyRegistered(address wallet, address nodeKey);
    /// @notice The wallet has no node key.
    error NotRegistered(address wallet);
    /// @notice The key belongs, or belonged, to `wallet`. A key serves one wallet, once.
    error NodeKeyTaken(address nodeKey, address wallet);
    /// @notice The consent was good until `deadline`.
    error ConsentExpired(uint256 deadline, uint256 nowSeconds);
    /// @notice The document is not signed by `expected` but by `recovered` (zero: by nobody).
    error BadSignature(address expected, address recovered);
    /// @notice An amount of zero.
    error ZeroAmount();
    /// @notice Active stake would be `active`, neither zero nor at least `minimum`.
    error StakeBelowMinimum(uint256 active, uint256 minimum);
    /// @notice The slot has room for `room` wei more, not for `amount`.
    error StakeTooLarge(uint256 amount, uint256 room);
    /// @notice Asked for `amount` wei of `active`.
    error InsufficientStake(uint256 amount, uint256 active);
    /// @notice Nothing is unbonding.
    error NothingUnbonding(address wallet);
    /// @notice Unbonding stake is released at `releaseAt`.
    error StillBonded(uint256 releaseAt, uint256 nowSeconds);
    /// @notice `caller` is not the Court.
    error NotCourt(address caller, address court);
    /// @notice This fault was punished before.
    error FaultAlreadyPunished(bytes32 faultId);
    /// @notice `sequence` is not above the last logged one.
    error SequenceNotAbove(uint64 sequence, uint64 last);
    /// @notice The tariff starts at `validFrom`, before `earliest`.
    error TariffTooSoon(uint256 validFrom, uint256 earliest);
    /// @notice The tariff's window is empty or ends after the year 8 million.
    error TariffWindow(uint64 validFrom, uint64 validUntil);

    /// @notice Bind the caller's first node key.
    /// @param deadline Unix second after which the consent is void.
    /// @param nodeKeySig 65 bytes r || s || v, low s, of `nodeKey` over NodeKeyConsent{wallet: caller, deadline}.
    function register(address nodeKey, uint64 deadline, bytes calldata nodeKeySig) external;

    /// @notice Retire the caller's node key and bind another. The former key's documents stay attributable.
    function rotateNodeKey(address nodeKey, uint64 deadline, bytes calldata nodeKeySig) external;

    /// @notice Add `amount` wei to the caller's active stake, which must then reach the minimum.
    /// @dev Unbonding stake cannot be put back: it must be withdrawn and staked again.
    function stake(uint256 amount) external;

    /// @notice Ask `amount` wei of active stake back; the rest must be zero or at least the minimum.
    /// @dev One bucket: a new request restarts the delay of what is already unbonding, so no stake leaves sooner than
    /// `unbondDelay` after the last request.
    function requestUnbond(uint256 amount) external;

    /// @notice Take the unbonded stake, once released.
    /// @return amount Wei sent to the caller.
    function withdraw() external returns (uint256 amount);

    /// @notice Take min(amount, active + unbonding) from `wallet`, active stake first. Only the Court.
    /// @dev `BOUNTY_BPS` of it, rounded down, waits for `reporter`; the rest is burned at once. A Court that owes
    /// victims names itself as reporter and divides the bounty. With no reporter all is burned. The bounty is far
    /// below one so that a cheater who reports himself still loses nearly all.
    /// @param faultId What is punished; each id counts once, for ever.
    /// @return taken Wei taken.
    function slash(address wallet, uint256 amount, bytes32 faultId, address reporter) external returns (uint256 taken);

    /// @notice Send `reporter` its bounties. Anybody may call; the money always goes to the reporter.
    /// @return amount Wei sent, possibly zero.
    function collectBounty(address reporter) external returns (uint256 amount);

    /// @notice Announce where a Profile is published. Nothing is stored: the id is the document's hashStruct, so a
    /// reader checks the file against it and a false announcement convinces nobody.
    function registerProfile(bytes32 profileId, bytes32 uriHash) external;

    /// @notice Publish a price sheet. Anybody may submit it; only the provider's current node key can have signed it.
    /// @dev In force a full epoch after logging at the earliest, so no payer meets a price it could not have seen.
    /// Sequences rise strictly per (provider, profile) and start at one. A second tariff signed with a logged sequence
    /// number is evidence of equivocation: its signature against `tariffAt`.
    /// @param signature 65 bytes r || s || v, low s, of the provider's node key over `tariff`.
    /// @return tariffHash The tariff's EIP-712 digest, the name it goes by in every other document.
    function logTariff(Tariff calldata tariff, bytes calldata signature) external returns (bytes32 tariffHash);

    /// @notice The key that signs for `wallet` now; zero when none.
    function nodeKeyOf(address wallet) external view returns (address);

    /// @notice Whose key it is or was, and when; all zero for an unknown key.
    function walletOf(address nodeKey) external view returns (address wallet, uint40 since, uint40 until);

    /// @notice Stake of `wallet` in wei, and the Unix second from which the unbonding part, if any, may be withdrawn.
    function stakeOf(address wallet) external view returns (uint96 active, uint96 unbonding, uint40 releaseAt);

    /// @notice Wei of bounties waiting for `reporter`.
    function bountyOf(address reporter) external view returns (uint256);

    /// @notice Whether the Court has punished this fault.
    function faultPunished(bytes32 faultId) external view returns (bool);

    /// @notice A logged tariff by its digest; all zero when it was never logged.
    function tariffs(bytes32 tariffHash) external view returns (address provider, uint48 validFrom, uint48 validUntil);

    /// @notice The highest sequence logged for (provider, profile); zero when none.
    function lastSequence(address provider, bytes32 profileId) external view returns (uint64);

    /// @notice Digest of the tariff logged with this sequence number; zero when none.
    function tariffAt(address provider, bytes32 profileId, uint64 sequence) external view returns (bytes32);

    /// @notice Seconds from the last unbond request to withdrawal. The Court compares it with the longest a case can
    /// take.
    function unbondDelay() external view returns (uint256);

    /// @notice EIP-712 domain separator of the Escrow on this chain.
    function domainSeparator() external view returns (bytes32);
}
