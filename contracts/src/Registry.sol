// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {SafeTransferLib} from "solady/utils/SafeTransferLib.sol";
import {IRegistry} from "./IRegistry.sol";
import {ITallyToken} from "./ITallyToken.sol";
import {NodeKeyConsent, Tariff, Types} from "./Types.sol";

/// @title Registry, as promised in IRegistry.
contract Registry is IRegistry {
    using SafeTransferLib for address;

    /// @notice Share of a slash that goes to the reporter, in basis points: 10 %. The rest is burned.
    uint256 public constant BOUNTY_BPS = 1_000;

    uint256 private constant BPS = 10_000;

    /// @notice Longest unbonding delay a deployment may choose. Seconds. Doubling it doubles how long a provider that
    /// leaves waits for its money.
    uint256 public constant MAX_UNBOND_DELAY = 365 days;

    /// @notice What stake is held in.
    ITallyToken public immutable token;

    /// @notice The Escrow, which every document names as its verifying contract. Never called.
    address public immutable escrow;

    /// @notice The only address that may slash.
    address public immutable court;

    /// @notice Least active stake, in wei; below it stake is refused.
    uint256 public immutable minStake;

    /// @notice Seconds from the last unbond request to withdrawal.
    uint256 public immutable unbondDelay;

    /// @notice Length of an epoch in seconds; a tariff is in force one epoch after logging at the earliest.
    uint256 public immutable epochSeconds;

    mapping(address wallet => address) private _nodeKeys;
    mapping(address nodeKey => NodeKey) private _wallets;
    mapping(address wallet => Stake) private _stakes;
    mapping(address reporter => uint256) private _bounties;
    mapping(bytes32 faultId => bool) private _punished;
    mapping(bytes32 tariffHash => TariffEntry) private _tariffs;
    mapping(address provider => mapping(bytes32 profileId => uint64)) private _lastSequence;
    mapping(address provider => mapping(bytes32 profileId => mapping(uint64 sequence => bytes32))) private _tariffAt;

    /// @param token_ TallyToken.
    /// @param escrow_ Verifying contract of the signing domain.
    /// @param court_ Who may slash.
    /// @param minStake_ Wei.
    /// @param unbondDelay_ Seconds; must be above the three windows together, so that stake outlasts judgement.
    /// @param epochSeconds_ Seconds.
    /// @param auditWindow Seconds in which a job can be audited.
    /// @param disputeWindow Seconds in which the accused can answer.
    /// @param verdictWindow Seconds in which a committee commits and reveals.
    constructor(
        ITallyToken token_,
        address escrow_,
        address court_,
        uint256 minStake_,
        uint256 unbondDelay_,
        uint256 epochSeconds_,
        uint256 auditWindow,
        uint256 disputeWindow,
        uint256 verdictWindow
    ) {
        uint256 judgement = auditWindow + disputeWindow + verdictWindow;
        if (unbondDelay_ <= judgement) revert UnbondDelayTooShort(unbondDelay_, judgement);
        if (unbondDelay_ > MAX_UNBOND_DELAY) revert UnbondDelayTooLong(unbondDelay_, MAX_UNBOND_DELAY);
        if (epochSeconds_ == 0) revert ZeroEpoch();
        token = token_;
        escrow = escrow_;
        court = court_;
        minStake = minStake_;
        unbondDelay = unbondDelay_;
        epochSeconds = epochSeconds_;
    }

    /// @inheritdoc IRegistry
    function register(address nodeKey, uint64 deadline, bytes calldata nodeKeySig) external {
        address current = _nodeKeys[msg.sender];
        if (current != address(0)) revert AlreadyRegistered(msg.sender, current);
        _bindNodeKey(nodeKey, deadline, nodeKeySig);
    }

    /// @inheritdoc IRegistry
    function rotateNodeKey(address nodeKey, uint64 deadline, bytes calldata nodeKeySig) external {
        address former = _nodeKeys[msg.sender];
        if (former == address(0)) revert NotRegistered(msg.sender);
        _wallets[former].until = uint40(block.timestamp);
        emit NodeKeyRetired(msg.sender, former);
        _bindNodeKey(nodeKey, deadline, nodeKeySig);
    }

    /// @inheritdoc IRegistry
    function stake(uint256 amount) external {
        if (amount == 0) revert ZeroAmount();
        Stake storage slot = _stakes[msg.sender];
        uint256 room = type(uint96).max - slot.active;
        if (amount > room) revert StakeTooLarge(amount, room);
        uint96 active = slot.active + uint96(amount);
        if (active < minStake) revert StakeBelowMinimum(active, minStake);
        slot.active = active;
        emit Staked(msg.sender, amount, active);
        address(token).safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @inheritdoc IRegistry
    function requestUnbond(uint256 amount) external {
        if (amount == 0) revert ZeroAmount();
        Stake storage slot = _stakes[msg.sender];
        if (amount > slot.active) revert InsufficientStake(amount, slot.active);
        uint96 active = slot.active - uint96(amount);
        if (active != 0 && active < minStake) revert StakeBelowMinimum(active, minStake);
        uint40 releaseAt = uint40(block.timestamp + unbondDelay);
        slot.active = active;
        slot.unbonding += uint96(amount);
        slot.releaseAt = releaseAt;
        emit UnbondRequested(msg.sender, amount, releaseAt);
    }

    /// @inheritdoc IRegistry
    function withdraw() external returns (uint256 amount) {
        Stake storage slot = _stakes[msg.sender];
        amount = slot.unbonding;
        if (amount == 0) revert NothingUnbonding(msg.sender);
        if (block.timestamp < slot.releaseAt) revert StillBonded(slot.releaseAt, block.timestamp);
        slot.unbonding = 0;
        slot.releaseAt = 0;
        emit Withdrawn(msg.sender, amount);
        address(token).safeTransfer(msg.sender, amount);
    }

    /// @inheritdoc IRegistry
    function slash(address wallet, uint256 amount, bytes32 faultId, address reporter) external returns (uint256 taken) {
        if (msg.sender != court) revert NotCourt(msg.sender, court);
        if (_punished[faultId]) revert FaultAlreadyPunished(faultId);
        Stake storage slot = _stakes[wallet];
        uint256 fromActive = _min(amount, slot.active);
        uint256 fromUnbonding = _min(amount - fromActive, slot.unbonding);
        taken = fromActive + fromUnbonding;
        uint256 bountyDown = reporter == address(0) ? 0 : taken * BOUNTY_BPS / BPS;
        _punished[faultId] = true;
        slot.active -= uint96(fromActive);
        slot.unbonding -= uint96(fromUnbonding);
        _bounties[reporter] += bountyDown;
        emit Slashed(wallet, faultId, reporter, taken, bountyDown);
        token.burn(taken - bountyDown);
    }

    /// @inheritdoc IRegistry
    function collectBounty(address reporter) external returns (uint256 amount) {
        amount = _bounties[reporter];
        if (amount == 0) return 0;
        _bounties[reporter] = 0;
        emit BountyCollected(reporter, amount);
        address(token).safeTransfer(reporter, amount);
    }

    /// @inheritdoc IRegistry
    function registerProfile(bytes32 profileId, bytes32 uriHash) external {
        emit ProfileRegistered(profileId, msg.sender, uriHash);
    }

    /// @inheritdoc IRegistry
    function logTariff(Tariff calldata tariff, bytes calldata signature) external returns (bytes32 tariffHash) {
        uint64 last = _lastSequence[tariff.provider][tariff.profileId];
        if (tariff.sequence <= last) revert SequenceNotAbove(tariff.sequence, last);
        uint256 earliest = block.timestamp + epochSeconds;
        if (tariff.validFrom < earliest) revert TariffTooSoon(tariff.validFrom, earliest);
        if (tariff.validUntil <= tariff.validFrom || tariff.validUntil > type(uint48).max) {
            revert TariffWindow(tariff.validFrom, tariff.validUntil);
        }
        address nodeKey = _nodeKeys[tariff.provider];
        if (nodeKey == address(0)) revert NotRegistered(tariff.provider);
        tariffHash = Types.digest(domainSeparator(), Types.hashTariff(tariff));
        _requireSigned(tariffHash, nodeKey, signature);

        _lastSequence[tariff.provider][tariff.profileId] = tariff.sequence;
        _tariffAt[tariff.provider][tariff.profileId][tariff.sequence] = tariffHash;
        _tariffs[tariffHash] = TariffEntry(tariff.provider, uint48(tariff.validFrom), uint48(tariff.validUntil));
        emit TariffLogged(
            tariff.provider, tariff.profileId, tariffHash, tariff.sequence, tariff.validFrom, tariff.validUntil
        );
    }

    /// @inheritdoc IRegistry
    function nodeKeyOf(address wallet) external view returns (address) {
        return _nodeKeys[wallet];
    }

    /// @inheritdoc IRegistry
    function walletOf(address nodeKey) external view returns (address wallet, uint40 since, uint40 until) {
        NodeKey storage key = _wallets[nodeKey];
        return (key.wallet, key.since, key.until);
    }

    /// @inheritdoc IRegistry
    function stakeOf(address wallet) external view returns (uint96 active, uint96 unbonding, uint40 releaseAt) {
        Stake storage slot = _stakes[wallet];
        return (slot.active, slot.unbonding, slot.releaseAt);
    }

    /// @inheritdoc IRegistry
    function bountyOf(address reporter) external view returns (uint256) {
        return _bounties[reporter];
    }

    /// @inheritdoc IRegistry
    function faultPunished(bytes32 faultId) external view returns (bool) {
        return _punished[faultId];
    }

    /// @inheritdoc IRegistry
    function tariffs(bytes32 tariffHash) external view returns (address provider, uint48 validFrom, uint48 validUntil) {
        TariffEntry storage entry = _tariffs[tariffHash];
        return (entry.provider, entry.validFrom, entry.validUntil);
    }

    /// @inheritdoc IRegistry
    function lastSequence(address provider, bytes32 profileId) external view returns (uint64) {
        return _lastSequence[provider][profileId];
    }

    /// @inheritdoc IRegistry
    function tariffAt(address provider, bytes32 profileId, uint64 sequence) external view returns (bytes32) {
        return _tariffAt[provider][profileId][sequence];
    }

    /// @inheritdoc IRegistry
    function domainSeparator() public view returns (bytes32) {
        return Types.domainSeparator(block.chainid, escrow);
    }

    function _bindNodeKey(address nodeKey, uint64 deadline, bytes calldata nodeKeySig) private {
        if (nodeKey == address(0)) revert ZeroNodeKey();
        address taken = _wallets[nodeKey].wallet;
        if (taken != address(0)) revert NodeKeyTaken(nodeKey, taken);
        if (block.timestamp > deadline) revert ConsentExpired(deadline, block.timestamp);
        bytes32 consent = Types.hashNodeKeyConsent(NodeKeyConsent(msg.sender, deadline));
        _requireSigned(Types.digest(domainSeparator(), consent), nodeKey, nodeKeySig);

        _nodeKeys[msg.sender] = nodeKey;
        _wallets[nodeKey] = NodeKey(msg.sender, uint40(block.timestamp), 0);
        emit NodeKeySet(msg.sender, nodeKey);
    }

    function _requireSigned(bytes32 digest, address expected, bytes calldata signature) private pure {
        (address recovered,,) = ECDSA.tryRecover(digest, signature);
        if (recovered != expected) revert BadSignature(expected, recovered);
    }

    function _min(uint256 a, uint256 b) private pure returns (uint256) {
        return a < b ? a : b;
    }
}
