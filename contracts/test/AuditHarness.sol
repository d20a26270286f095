// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {EProcess, Evidence} from "../src/Evidence.sol";
import {Entry, SumNode, SumTree} from "../src/SumTree.sol";

/// @notice Exposes the audit's libraries to the vector tests (tests/contracts/test_audit_vectors.py); deployed nowhere
/// else.
contract AuditHarness {
    function leaf(Entry calldata entry) external pure returns (SumNode memory) {
        return SumTree.leaf(entry);
    }

    function verify(
        Entry calldata entry,
        uint256 index,
        uint256 count,
        SumNode[] calldata siblings,
        bytes32 root,
        uint256 total
    ) external pure returns (bool) {
        return SumTree.verify(entry, index, count, siblings, root, total);
    }

    function tailUp(uint256 n, uint256 k, uint256 ppm) external pure returns (uint256) {
        return Evidence.tailUp(n, k, ppm);
    }

    function hardFail(uint256 n, uint256 flags, uint256 voids, uint256 flagPpm) external pure returns (bool) {
        return Evidence.hardFail(n, flags, voids, flagPpm);
    }

    function update(EProcess calldata process, uint256 n, uint256 flags, uint256 voids, uint256 flagPpm)
        external
        pure
        returns (EProcess memory next, uint256 value)
    {
        next = Evidence.update(process, n, flags, voids, flagPpm);
        value = Evidence.value(next);
    }
}
