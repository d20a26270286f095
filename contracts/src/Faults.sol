// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {ICourt} from "./ICourt.sol";
import {IEscrow} from "./IEscrow.sol";
import {IFaults} from "./IFaults.sol";
import {IRegistry} from "./IRegistry.sol";
import {Price} from "./Price.sol";
import {Entry, SumNode, SumTree} from "./SumTree.sol";
import {Tariff, Types, WorkReceipt} from "./Types.sol";

/// @title Faults, as promised in IFaults.
contract Faults is IFaults {
    uint8 public constant TWO_TARIFFS = 0;
    uint8 public constant TWO_RECEIPTS = 1;
    uint8 public constant PRICE = 2;
    uint8 public constant BROKEN_CHAIN = 3;
    uint8 public constant MISSING = 4;
    uint8 public constant UNSORTED = 5;
    uint8 public constant UNCOMMITTED = 6;

    /// @notice Share of the stake for a lie told in two documents, in basis points. Half, and not all: what was lost to
    /// it can be no more than one job or one sheet, and a defect of software may do it.
    uint16 public constant LIE_BPS = 5_000;

    /// @notice Share of the stake for a wrong price or a late commitment, in basis points.
    uint16 public constant LAPSE_BPS = 1_000;

    /// @notice An entry of a commitment, and what proves its place.
    struct Leaf {
        Entry entry;
        uint256 index;
        SumNode[] siblings;
    }

    struct Ruling {
        address accused;
        bytes32 faultId;
        uint16 shareBps;
        address payer;
        uint96 payerCap;
    }

    /// @notice Whose documents they are, and which tariffs were published.
    IRegistry public immutable registry;

    /// @notice Who pays for which channel.
    IEscrow public immutable escrow;

    /// @notice What was committed to.
    ICourt public immutable court;

    constructor(IRegistry registry_, IEscrow escrow_, ICourt court_) {
        registry = registry_;
        escrow = escrow_;
        court = court_;
    }

    /// @inheritdoc IFaults
    function judge(uint8 kind, bytes calldata proof)
        external
        view
        returns (address accused, bytes32 faultId, uint16 shareBps, address payer, uint96 payerCap)
    {
        Ruling memory found;
        if (kind == TWO_TARIFFS) found = _twoTariffs(proof);
        else if (kind == TWO_RECEIPTS || kind == BROKEN_CHAIN) found = _pair(kind, proof);
        else if (kind == PRICE) found = _price(proof);
        else if (kind == MISSING) found = _missing(proof);
        else if (kind == UNSORTED) found = _unsorted(proof);
        else if (kind == UNCOMMITTED) found = _uncommitted(proof);
        else revert UnknownKind(kind);
        return (found.accused, found.faultId, found.shareBps, found.payer, found.payerCap);
    }

    // ------------------------------------------------------------------------------------------------ tariffs, prices

    function _twoTariffs(bytes calldata proof) private view returns (Ruling memory) {
        (Tariff memory a, bytes memory sigA, Tariff memory b, bytes memory sigB) =
            abi.decode(proof, (Tariff, bytes, Tariff, bytes));
        bool same = a.provider == b.provider && a.profileId == b.profileId && a.sequence == b.sequence;
        _require(same, "one provider, profile and sequence");
        (bytes32 hashA, bytes32 hashB) = (_digest(Types.hashTariff(a)), _digest(Types.hashTariff(b)));
        _require(hashA != hashB, "different sheets");
        _requireSigned(a.provider, hashA, sigA);
        _requireSigned(b.provider, hashB, sigB);
        bytes32 faultId = keccak256(abi.encode(TWO_TARIFFS, a.provider, a.profileId, a.sequence));
        return Ruling(a.provider, faultId, LIE_BPS, address(0), 0);
    }

    function _price(bytes calldata proof) private view returns (Ruling memory) {
        (Tariff memory tariff, WorkReceipt memory receipt, bytes memory sig) =
            abi.decode(proof, (Tariff, WorkReceipt, bytes));
        bytes32 tariffHash = _requireNamed(tariff, receipt, sig);
        (address logger,,) = registry.tariffs(tariffHash);
        _require(logger == receipt.provider, "a logged tariff");
        _require(!Price.holds(tariff, receipt), "a wrong price");
        return _ofJob(LAPSE_BPS, receipt, receipt.total);
    }

    // ------------------------------------------------------------------------------------------------------- receipts

    /// @dev TWO_RECEIPTS and BROKEN_CHAIN: two receipts of one job.
    function _pair(uint8 kind, bytes calldata proof) private view returns (Ruling memory) {
        (WorkReceipt memory a, bytes memory sigA, WorkReceipt memory b, bytes memory sigB) =
            abi.decode(proof, (WorkReceipt, bytes, WorkReceipt, bytes));
        _require(a.provider == b.provider && a.jobId == b.jobId, "one provider and job");
        bytes32 first = _requireReceipt(a, sigA);
        bytes32 second = _requireReceipt(b, sigB);
        if (kind == TWO_RECEIPTS) _require(a.step == b.step && first != second, "two receipts of one step");
        else _require(_isBroken(a, first, b), "a broken chain");
        return _ofJob(LIE_BPS, b, a.total > b.total ? a.total : b.total);
    }

    /// @dev Whether `later`, of a higher step, and `earlier` cannot both be of one honest chain.
    function _isBroken(WorkReceipt memory earlier, bytes32 earlierDigest, WorkReceipt memory later)
        private
        pure
        returns (bool)
    {
        if (later.step <= earlier.step) return false;
        if (later.step - earlier.step == 1 && later.previous != earlierDigest) return true;
        if (earlier.isFinal) return true;
        if (later.promptTokens < earlier.promptTokens || later.completionTokens < earlier.completionTokens) {
            return true;
        }
        if (later.reasoningTokens < earlier.reasoningTokens || later.steMicro < earlier.steMicro) return true;
        return later.total < earlier.total && later.refund == 0 && later.multiplier == earlier.multiplier;
    }

    // ---------------------------------------------------------------------------------------------------- commitments

    function _missing(bytes calldata proof) private view returns (Ruling memory) {
        (Tariff memory tariff, WorkReceipt memory receipt, bytes memory sig, Leaf[] memory around) =
            abi.decode(proof, (Tariff, WorkReceipt, bytes, Leaf[]));
        _requireNamed(tariff, receipt, sig);
        (bytes32 key,) = _keyOf(tariff, receipt);
        ICourt.Made memory made = court.commitments(key);
        _require(made.provider != address(0), "a commitment");
        for (uint256 i; i < around.length; ++i) {
            _requireStands(made, around[i]);
        }
        _require(_isAbsent(receipt.jobId, made.count, around), "the job's absence");
        return _ofJob(LIE_BPS, receipt, receipt.total);
    }

    function _isAbsent(bytes32 jobId, uint256 count, Leaf[] memory around) private pure returns (bool) {
        if (around.length == 0) return count == 0;
        Leaf memory left = around[0];
        if (around.length == 1) {
            if (left.index == 0 && jobId < left.entry.jobId) return true;
            return left.index + 1 == count && left.entry.jobId < jobId;
        }
        Leaf memory right = around[1];
        if (around.length != 2 || right.index != left.index + 1) return false;
        return left.entry.jobId < jobId && jobId < right.entry.jobId;
    }

    function _unsorted(bytes calldata proof) private view returns (Ruling memory) {
        (bytes32 key, Leaf memory left, Leaf memory right) = abi.decode(proof, (bytes32, Leaf, Leaf));
        ICourt.Made memory made = court.commitments(key);
        _require(right.index == left.index + 1, "neighbours");
        _requireStands(made, left);
        _requireStands(made, right);
        _require(left.entry.jobId >= right.entry.jobId, "a wrong order");
        return Ruling(made.provider, keccak256(abi.encode(UNSORTED, key)), LIE_BPS, address(0), 0);
    }

    function _uncommitted(bytes calldata proof) private view returns (Ruling memory) {
        (Tariff memory tariff, WorkReceipt memory receipt, bytes memory sig) =
            abi.decode(proof, (Tariff, WorkReceipt, bytes));
        _requireNamed(tariff, receipt, sig);
        (bytes32 key, uint256 begins) = _keyOf(tariff, receipt);
        ICourt.Rules memory rules = court.rules();
        uint256 since = court.profileSince(tariff.profileId);
        _require(since != 0 && begins >= since, "an epoch begun under an accepted profile");
        uint256 overdue = begins + rules.epochSeconds + rules.commitWindow;
        _require(block.timestamp >= overdue, "a window that is over");
        _require(court.commitments(key).provider == address(0), "no commitment");
        address payer = escrow.ownerOf(receipt.provider, receipt.client);
        bytes32 faultId = keccak256(abi.encode(UNCOMMITTED, key));
        return Ruling(receipt.provider, faultId, LAPSE_BPS, payer, receipt.total);
    }

    /// @dev Key of the commitment that a job belongs to, and the Unix second its epoch begins.
    function _keyOf(Tariff memory tariff, WorkReceipt memory receipt)
        private
        view
        returns (bytes32 key, uint256 begins)
    {
        uint256 epochSeconds = court.rules().epochSeconds;
        uint256 epoch = receipt.receivedAt / 1000 / epochSeconds;
        return (keccak256(abi.encode(receipt.provider, tariff.profileId, epoch)), epoch * epochSeconds);
    }

    // ----------------------------------------------------------------------------------------------------- documents

    /// @dev Named after its share: a lie about a job that shows in several ways is punished once.
    function _ofJob(uint16 shareBps, WorkReceipt memory receipt, uint96 cap) private view returns (Ruling memory) {
        bytes32 faultId = keccak256(abi.encode(shareBps, receipt.provider, receipt.jobId));
        return Ruling(receipt.provider, faultId, shareBps, escrow.ownerOf(receipt.provider, receipt.client), cap);
    }

    /// @dev The provider's receipt, under the tariff it names.
    function _requireNamed(Tariff memory tariff, WorkReceipt memory receipt, bytes memory sig)
        private
        view
        returns (bytes32 tariffHash)
    {
        tariffHash = _digest(Types.hashTariff(tariff));
        bool named = tariffHash == receipt.tariffHash && tariff.provider == receipt.provider;
        _require(named, "the tariff that the receipt names");
        _requireReceipt(receipt, sig);
    }

    function _requireReceipt(WorkReceipt memory receipt, bytes memory sig) private view returns (bytes32 digest) {
        digest = _digest(Types.hashWorkReceipt(receipt));
        _requireSigned(receipt.provider, digest, sig);
    }

    /// @dev Signed by a key that is or was the provider's: what a retired key signed stays attributable.
    function _requireSigned(address provider, bytes32 digest, bytes memory sig) private view {
        (address recovered,,) = ECDSA.tryRecover(digest, sig);
        (address wallet,,) = registry.walletOf(recovered);
        if (wallet == address(0) || wallet != provider) revert NotSignedBy(provider, wallet);
    }

    function _requireStands(ICourt.Made memory made, Leaf memory leaf) private pure {
        bool stands = SumTree.verify(leaf.entry, leaf.index, made.count, leaf.siblings, made.root, made.total);
        _require(stands, "an entry of the commitment");
    }

    function _digest(bytes32 structHash) private view returns (bytes32) {
        return Types.digest(Types.domainSeparator(block.chainid, address(escrow)), structHash);
    }

    function _require(bool holds, string memory step) private pure {
        if (!holds) revert NotProven(step);
    }
}
