// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @notice Gap vectors of verdicts: 16 big-endian int16 in a word, thousandths of a logit (incentives/audit_draw.py).
/// Who ran the model measures what the others measure; who copied or guessed does not.
library Gaps {
    uint256 private constant COUNT = 16;

    /// @dev Distance at which two gaps still match, and how many must.
    int256 private constant TOLERANCE = 150;
    uint256 private constant TO_MATCH = 12;

    /// @notice Whether both were measured on the same work: at least 12 of 16 within 0.15 logits.
    function matching(bytes32 a, bytes32 b) internal pure returns (bool) {
        uint256 near;
        for (uint256 i; i < COUNT; ++i) {
            int256 distance = gapAt(a, i) - gapAt(b, i);
            if (distance <= TOLERANCE && distance >= -TOLERANCE) ++near;
        }
        return near >= TO_MATCH;
    }

    /// @notice The lower median at each position; `vectors` has at least one.
    function median(bytes32[] memory vectors) internal pure returns (bytes32 packed) {
        uint256[] memory column = new uint256[](vectors.length);
        uint256 word;
        for (uint256 i; i < COUNT; ++i) {
            for (uint256 v; v < vectors.length; ++v) {
                // Shifted into the unsigned range, which keeps the order.
                column[v] = uint256(gapAt(vectors[v], i) + 32_768);
            }
            word = word << 16 | (lowerMedian(column) ^ 0x8000);
        }
        return bytes32(word);
    }

    /// @notice The middle value, the lower of two; at least one. Sorts `values` in place.
    function lowerMedian(uint256[] memory values) internal pure returns (uint256) {
        for (uint256 i = 1; i < values.length; ++i) {
            uint256 value = values[i];
            uint256 j = i;
            for (; j > 0 && values[j - 1] > value; --j) {
                values[j] = values[j - 1];
            }
            values[j] = value;
        }
        return values[(values.length - 1) / 2];
    }

    /// @notice Gap `i` of a vector, the first from the left.
    function gapAt(bytes32 vector, uint256 i) internal pure returns (int256) {
        return int16(uint16(uint256(vector) >> (240 - 16 * i)));
    }
}
