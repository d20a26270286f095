// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice A job in a provider's tree: its id, the digest of its last receipt, and what it owes in wei.
struct Entry {
    bytes32 jobId;
    bytes32 receipt;
    uint96 amount;
}

/// @notice A subtree: its hash and the wei below it.
struct SumNode {
    bytes32 hash;
    uint96 total;
}

/// @notice The Merkle-sum tree of protocol/merkle.py, bit for bit: tests/vectors/merkle.json is read by both.
/// Entries stand in ascending order of job id. The side of each sibling follows from the leaf's index and the tree's
/// count, so a proof also proves the index.
library SumTree {
    /// @notice Node of one entry. The tag 0 keeps leaves apart from parents (RFC 6962, 2.1).
    function leaf(Entry memory entry) internal pure returns (SumNode memory) {
        bytes32 hash = keccak256(abi.encodePacked(uint8(0), entry.jobId, entry.receipt, uint256(entry.amount)));
        return SumNode(hash, entry.amount);
    }

    /// @notice Whether `entry` is leaf `index` of `count` under (`root`, `total`), every sum on the way in range.
    /// @dev Never reverts: a proof of the wrong length, or whose sums pass uint96, is no proof.
    function verify(
        Entry memory entry,
        uint256 index,
        uint256 count,
        SumNode[] memory siblings,
        bytes32 root,
        uint256 total
    ) internal pure returns (bool) {
        if (index >= count) return false;
        SumNode memory node = leaf(entry);
        uint256 used;
        while (count > 1) {
            // A node without a partner goes up unchanged.
            if (index ^ 1 < count) {
                if (used == siblings.length) return false;
                SumNode memory sibling = siblings[used++];
                uint256 sum = uint256(node.total) + sibling.total;
                if (sum > type(uint96).max) return false;
                node = index & 1 == 1 ? _parent(sibling, node, sum) : _parent(node, sibling, sum);
            }
            index >>= 1;
            // No count is near 2^256: each pass of a larger one would need a sibling.
            unchecked {
                count = (count >> 1) + (count & 1);
            }
        }
        return used == siblings.length && node.hash == root && node.total == total;
    }

    /// @dev `sum` is the checked total of both.
    function _parent(SumNode memory left, SumNode memory right, uint256 sum) private pure returns (SumNode memory) {
        bytes32 hash =
            keccak256(abi.encodePacked(uint8(1), left.hash, uint256(left.total), right.hash, uint256(right.total)));
        // forge-lint: disable-next-line(unsafe-typecast)
        return SumNode(hash, uint96(sum));
    }
}
