// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {SafeTransferLib} from "solady/utils/SafeTransferLib.sol";
import {IEscrow} from "./IEscrow.sol";
import {ITallyToken} from "./ITallyToken.sol";
import {SessionConsent, Types, VOUCHER_TYPEHASH} from "./Types.sol";

/// @title Escrow, as promised in IEscrow.
contract Escrow is IEscrow {
    using SafeTransferLib for address;

    /// @notice Protocol fee in basis points of what a batch pays: 12 %, all burned.
    uint256 public constant FEE_BPS = 1_200;

    uint256 private constant BPS = 10_000;

    /// @notice Longest exit delay a deployment may choose. Seconds. Doubling it doubles how long a client's money can
    /// be kept from it.
    uint256 public constant MAX_EXIT_DELAY = 30 days;

    /// @notice Bytes of one packed voucher: r, s with parity, cumulative.
    uint256 public constant VOUCHER_BYTES = 76;

    /// @dev Half of secp256k1's order; an s above it is the malleable twin of a lower one. Packing in 255 bits excludes
    /// nearly all of those; the check excludes the rest, which a key can be made for.
    uint256 private constant HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0;

    /// @dev EIP-2098: s is the lower 255 bits of its word, the recovery parity the top one.
    uint256 private constant SIGNATURE_S = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF;

    uint256 private constant UINT96 = 0xFFFFFFFFFFFFFFFFFFFFFFFF;

    /// @dev keccak256 of `Settled(address,uint256,uint256,uint256[])`.
    uint256 private constant SETTLED_EVENT = 0xc85ecc441bf1c11281d951e2305ebcffde7a103c1493dcd7c3f405aba97da679;

    /// @notice What deposits are made in.
    ITallyToken public immutable token;

    /// @inheritdoc IEscrow
    uint256 public immutable exitDelay;

    uint256 private immutable _deployedChainId;
    bytes32 private immutable _deployedSeparator;

    /// @dev Two counters that share a slot, so that the pending one never leaves or returns to an all-zero slot
    /// once something was paid out. 128 bits hold the token's cap 3e11 times over.
    struct Pot {
        uint128 pending;
        uint128 paidOut;
    }

    mapping(address provider => mapping(address signer => Channel)) private _channels;
    mapping(address provider => mapping(address signer => address)) private _owners;
    mapping(address provider => Pot) private _earned;
    Pot private _fees;

    /// @param token_ TallyToken.
    /// @param exitDelay_ Seconds a provider has to settle after an exit was requested.
    constructor(ITallyToken token_, uint256 exitDelay_) {
        if (exitDelay_ == 0 || exitDelay_ > MAX_EXIT_DELAY) revert ExitDelayOutOfRange(exitDelay_, MAX_EXIT_DELAY);
        token = token_;
        exitDelay = exitDelay_;
        _deployedChainId = block.chainid;
        _deployedSeparator = Types.domainSeparator(block.chainid, address(this));
    }

    /// @inheritdoc IEscrow
    function open(address provider, address signer, uint256 amount, uint64 deadline, bytes calldata consentSig)
        external
    {
        _open(provider, signer, amount, deadline, consentSig);
    }

    /// @inheritdoc IEscrow
    function openWithPermit(
        address provider,
        address signer,
        uint256 amount,
        uint64 deadline,
        bytes calldata consentSig,
        Permit calldata permit
    ) external {
        try token.permit(msg.sender, address(this), amount, permit.deadline, permit.v, permit.r, permit.s) {} catch {}
        _open(provider, signer, amount, deadline, consentSig);
    }

    /// @inheritdoc IEscrow
    function topUp(address provider, address signer, uint256 amount) external {
        Channel storage slot = _ownedChannel(provider, signer);
        if (slot.exitAt != 0) revert ExitPending(slot.exitAt);
        uint96 deposit = _raised(slot.deposit, amount);
        slot.deposit = deposit;
        emit ToppedUp(provider, signer, amount, deposit);
        address(token).safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @inheritdoc IEscrow
    /// @dev One assembly loop, because 100 vouchers share one transaction and every 100 gas here is 1 % of its cost.
    /// test/EscrowReference.sol says the same in plain Solidity, and the two are fuzzed against each other.
    ///
    /// Memory is addressed absolutely from 0x80 on: nothing allocated there is needed any more, and the free pointer
    /// stays as it is because nothing written here is needed afterwards.
    ///   0x080 VOUCHER_TYPEHASH | 0x0a0 provider | 0x0c0 cumulative             -> struct hash
    ///   0x0fe 0x1901 | 0x100 separator | 0x120 struct hash                     -> digest
    ///   0x140 digest | 0x160 v | 0x180 r | 0x1a0 s                             -> ecrecover's input
    ///   0x1c0 signer | 0x1e0 slot of _channels[provider]                       -> the channel's slot
    ///   0x200 paid | 0x220 fee | 0x240 offset | 0x260 length | 0x280 claims... -> event data
    function settle(address provider, bytes calldata vouchers) external returns (uint256 paid) {
        if (vouchers.length % VOUCHER_BYTES != 0) revert MalformedBatch(vouchers.length, VOUCHER_BYTES);
        bytes32 separator = domainSeparator();
        mapping(address signer => Channel) storage channels = _channels[provider];
        uint256 claimsEnd;
        assembly {
            mstore(0x80, VOUCHER_TYPEHASH)
            mstore(0xa0, provider)
            mstore(0xe0, 0x1901)
            mstore(0x100, separator)
            mstore(0x1e0, channels.slot)
            claimsEnd := 0x280
            let item := vouchers.offset
            let end := add(item, vouchers.length)
            for {} lt(item, end) { item := add(item, VOUCHER_BYTES) } {
                let cumulative := shr(160, calldataload(add(item, 0x40)))
                mstore(0xc0, cumulative)
                mstore(0x120, keccak256(0x80, 0x60))
                mstore(0x140, keccak256(0xfe, 0x42))
                mstore(0x180, calldataload(item))
                {
                    let vs := calldataload(add(item, 0x20))
                    mstore(0x160, add(27, shr(255, vs)))
                    vs := and(vs, SIGNATURE_S)
                    if gt(vs, HALF_ORDER) { continue }
                    mstore(0x1a0, vs)
                }
                // ecrecover returns nothing, rather than zero, when nobody signed: the zero address is never read.
                pop(staticcall(gas(), 1, 0x140, 0x80, 0x1c0, 0x20))
                if iszero(returndatasize()) { continue }
                let channelSlot := keccak256(0x1c0, 0x40)
                // [exitAt 40 | claimed 96 | deposit 96], deposit lowest.
                let packed := sload(channelSlot)
                let claimed := and(shr(96, packed), UINT96)
                {
                    let deposit := and(packed, UINT96)
                    if gt(cumulative, deposit) { cumulative := deposit }
                }
                if iszero(gt(cumulative, claimed)) { continue }
                let amount := sub(cumulative, claimed)
                sstore(channelSlot, add(packed, shl(96, amount)))
                paid := add(paid, amount)
                mstore(claimsEnd, or(shl(96, mload(0x1c0)), cumulative))
                claimsEnd := add(claimsEnd, 0x20)
            }
        }
        if (paid == 0) return 0;

        uint256 feeDown = paid * FEE_BPS / BPS;
        // Bounded by the channels' deposits, which the token's supply bounds far below 2**128.
        unchecked {
            _earned[provider].pending += uint128(paid - feeDown);
            _fees.pending += uint128(feeDown);
        }
        assembly {
            mstore(0x200, paid)
            mstore(0x220, feeDown)
            mstore(0x240, 0x60)
            mstore(0x260, shr(5, sub(claimsEnd, 0x280)))
            log2(0x200, sub(claimsEnd, 0x200), SETTLED_EVENT, provider)
        }
    }

    /// @inheritdoc IEscrow
    function requestExit(address provider, address signer) external {
        Channel storage slot = _ownedChannel(provider, signer);
        if (slot.exitAt != 0) revert ExitPending(slot.exitAt);
        uint40 exitAt = uint40(block.timestamp + exitDelay);
        slot.exitAt = exitAt;
        emit ExitRequested(provider, signer, exitAt);
    }

    /// @inheritdoc IEscrow
    function cancelExit(address provider, address signer) external {
        Channel storage slot = _ownedChannel(provider, signer);
        if (slot.exitAt == 0) revert NoExitRequested();
        slot.exitAt = 0;
        emit ExitCancelled(provider, signer);
    }

    /// @inheritdoc IEscrow
    function exit(address provider, address signer) external returns (uint256 refund) {
        Channel storage slot = _ownedChannel(provider, signer);
        if (slot.exitAt == 0) revert NoExitRequested();
        if (block.timestamp < slot.exitAt) revert ExitTooEarly(slot.exitAt, block.timestamp);
        refund = slot.deposit - slot.claimed;
        slot.deposit = slot.claimed;
        slot.exitAt = 0;
        emit Exited(provider, signer, refund);
        address(token).safeTransfer(msg.sender, refund);
    }

    /// @inheritdoc IEscrow
    function collect(address provider) external returns (uint256 amount) {
        Pot storage pot = _earned[provider];
        amount = _payOut(pot);
        if (amount == 0) return 0;
        emit Collected(provider, amount);
        address(token).safeTransfer(provider, amount);
    }

    /// @inheritdoc IEscrow
    function burnFees() external returns (uint256 amount) {
        amount = _payOut(_fees);
        if (amount == 0) return 0;
        emit FeesBurned(amount);
        token.burn(amount);
    }

    /// @inheritdoc IEscrow
    function channel(address provider, address signer) external view returns (Channel memory) {
        return _channels[provider][signer];
    }

    /// @inheritdoc IEscrow
    function ownerOf(address provider, address signer) external view returns (address) {
        return _owners[provider][signer];
    }

    /// @inheritdoc IEscrow
    function earnedOf(address provider) external view returns (uint128 pending, uint128 collected) {
        Pot storage pot = _earned[provider];
        return (pot.pending, pot.paidOut);
    }

    /// @inheritdoc IEscrow
    function fees() external view returns (uint128 pending, uint128 burned) {
        return (_fees.pending, _fees.paidOut);
    }

    /// @inheritdoc IEscrow
    function domainSeparator() public view returns (bytes32) {
        if (block.chainid == _deployedChainId) return _deployedSeparator;
        return Types.domainSeparator(block.chainid, address(this));
    }

    function _open(address provider, address signer, uint256 amount, uint64 deadline, bytes calldata consentSig)
        private
    {
        if (provider == address(0) || signer == address(0)) revert ZeroParty(provider, signer);
        if (block.timestamp > deadline) revert ConsentExpired(deadline, block.timestamp);
        address owner = _owners[provider][signer];
        if (owner != address(0)) revert ChannelTaken(provider, signer, owner);
        bytes32 consent = Types.hashSessionConsent(SessionConsent(msg.sender, provider, deadline));
        (address recovered,,) = ECDSA.tryRecover(Types.digest(domainSeparator(), consent), consentSig);
        if (recovered != signer) revert BadConsent(signer, recovered);

        _owners[provider][signer] = msg.sender;
        _channels[provider][signer].deposit = _raised(0, amount);
        emit ChannelOpened(provider, signer, msg.sender, amount);
        address(token).safeTransferFrom(msg.sender, address(this), amount);
    }

    function _ownedChannel(address provider, address signer) private view returns (Channel storage) {
        address owner = _owners[provider][signer];
        if (msg.sender != owner) revert NotChannelOwner(msg.sender, owner);
        return _channels[provider][signer];
    }

    /// @dev `deposit` plus a non-zero `amount`, refused above uint96.
    function _raised(uint96 deposit, uint256 amount) private pure returns (uint96) {
        if (amount == 0) revert ZeroAmount();
        uint256 room = type(uint96).max - deposit;
        if (amount > room) revert DepositTooLarge(amount, room);
        return deposit + uint96(amount);
    }

    /// @dev Account everything pending in `pot` as paid out.
    function _payOut(Pot storage pot) private returns (uint128 amount) {
        amount = pot.pending;
        pot.pending = 0;
        pot.paidOut += amount;
    }
}
