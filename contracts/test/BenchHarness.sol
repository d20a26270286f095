// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Bench, Finding} from "../src/Bench.sol";
import {Gaps} from "../src/Gaps.sol";
import {ICourt} from "../src/ICourt.sol";
import {Verdict} from "../src/Types.sol";

/// @notice Exposes the committee's rules to tests/contracts/test_bench.py, which compares them with the Python; deployed
/// nowhere else.
contract BenchHarness {
    function committee(
        bytes32 beacon,
        uint256 round,
        address[] calldata eligible,
        address[] calldata seated,
        uint256 size
    ) external pure returns (address[] memory) {
        return Bench.lowest(beacon, round, Bench.fresh(eligible, seated, size), size);
    }

    function quorum(uint256 size) external pure returns (uint256) {
        return Bench.quorum(size);
    }

    function contradicts(Verdict calldata verdict, uint256 flagPpm) external pure returns (bool) {
        return Bench.contradicts(verdict, flagPpm);
    }

    function found(ICourt.Seat[] calldata seats)
        external
        pure
        returns (bool decided, ICourt.Outcome outcome, Finding memory finding)
    {
        (decided, outcome) = Bench.agreed(seats);
        if (decided) finding = Bench.measured(seats, outcome);
    }

    function matching(bytes32 a, bytes32 b) external pure returns (bool) {
        return Gaps.matching(a, b);
    }

    function median(bytes32[] calldata vectors) external pure returns (bytes32) {
        return Gaps.median(vectors);
    }
}
