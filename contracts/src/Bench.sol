// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Evidence} from "./Evidence.sol";
import {Gaps} from "./Gaps.sol";
import {ICourt} from "./ICourt.sol";
import {Verdict} from "./Types.sol";

/// @notice What agreeing members measured: lower medians, so that no minority among them moves a number.
struct Finding {
    uint256 tokens;
    uint256 flags;
    uint256 voids;
    bytes32 gaps;
}

/// @notice The rules of a committee without its state: who is drawn, what a quorum is, what it found
/// (incentives/committee.py and verdicts.py).
library Bench {
    /// @dev Output of a planted error. Doubling it doubles what a provider can cheat by while one is due.
    uint256 private constant FORCED_TOKENS = 64;

    /// @notice Votes for one outcome that decide a committee of `size`: 3 of 3, 3 of 4, 5 of 7, 15 of 21.
    function quorum(uint256 size) internal pure returns (uint256) {
        return size - (size - 1) / 3;
    }

    /// @notice The `size` of `pool` that rank lowest by keccak256(abi.encode(beacon, round, validator)), lowest first;
    /// all when there are no more.
    /// @dev A rank depends on nobody else, so whoever joins or leaves the pool after the beacon is known moves no other
    /// member's rank: a shuffle by index would let colluders choose the committee by retiring some of their own.
    function lowest(bytes32 beacon, uint256 round, address[] memory pool, uint256 size)
        internal
        pure
        returns (address[] memory members)
    {
        if (size > pool.length) size = pool.length;
        members = new address[](size);
        uint256[] memory ranks = new uint256[](size);
        uint256 taken;
        for (uint256 i; i < pool.length; ++i) {
            uint256 rank = uint256(keccak256(abi.encode(beacon, round, pool[i])));
            if (taken == size && rank >= ranks[size - 1]) continue;
            uint256 j = taken == size ? size - 1 : taken++;
            for (; j > 0 && ranks[j - 1] > rank; --j) {
                ranks[j] = ranks[j - 1];
                members[j] = members[j - 1];
            }
            ranks[j] = rank;
            members[j] = pool[i];
        }
    }

    /// @notice `pool` without `seated` when at least `size` remain, else `pool`.
    function fresh(address[] memory pool, address[] memory seated, uint256 size)
        internal
        pure
        returns (address[] memory)
    {
        address[] memory others = new address[](pool.length);
        uint256 left;
        for (uint256 i; i < pool.length; ++i) {
            uint256 j;
            while (j < seated.length && seated[j] != pool[i]) ++j;
            if (j == seated.length) others[left++] = pool[i];
        }
        if (left < size) return pool;
        assembly ("memory-safe") {
            mstore(others, left)
        }
        return others;
    }

    /// @notice The outcome that a quorum of the seats agreed on.
    function agreed(ICourt.Seat[] memory seats) internal pure returns (bool decided, ICourt.Outcome found) {
        uint256[5] memory votes;
        for (uint256 i; i < seats.length; ++i) {
            if (seats[i].status != ICourt.SeatStatus.REVEALED) continue;
            uint256 outcome = uint256(seats[i].outcome);
            if (++votes[outcome] >= quorum(seats.length)) return (true, seats[i].outcome);
        }
    }

    /// @notice What those who voted `found` measured; at least one did.
    function measured(ICourt.Seat[] memory seats, ICourt.Outcome found) internal pure returns (Finding memory) {
        uint256 votes;
        bytes32[] memory gaps = new bytes32[](seats.length);
        uint256[] memory tokens = new uint256[](seats.length);
        uint256[] memory flags = new uint256[](seats.length);
        uint256[] memory voids = new uint256[](seats.length);
        for (uint256 i; i < seats.length; ++i) {
            ICourt.Seat memory seat = seats[i];
            if (seat.status != ICourt.SeatStatus.REVEALED || seat.outcome != found) continue;
            (gaps[votes], tokens[votes], flags[votes], voids[votes]) = (seat.word, seat.tokens, seat.flags, seat.voids);
            ++votes;
        }
        assembly ("memory-safe") {
            mstore(gaps, votes)
            mstore(tokens, votes)
            mstore(flags, votes)
            mstore(voids, votes)
        }
        return Finding(Gaps.lowerMedian(tokens), Gaps.lowerMedian(flags), Gaps.lowerMedian(voids), Gaps.median(gaps));
    }

    /// @notice Most flags that a forced error explains: its 64 tokens (node/provider/decoys.py), and what honest work
    /// beside it has all but never more of. More were not forced, and no provider may cheat on top of an error.
    function excused(Finding memory finding, uint256 flagPpm) internal pure returns (uint256) {
        return FORCED_TOKENS + Evidence.farAbove(finding.tokens, flagPpm);
    }

    /// @notice Whether a verdict's outcome is not what its own counts give, or its counts cannot be.
    function contradicts(Verdict calldata v, uint256 flagPpm) internal pure returns (bool) {
        if (v.outcome > uint8(type(ICourt.Outcome).max)) return true;
        if (v.voids > v.flags || v.flags > v.tokens || v.worstVoids > v.worstFlags) return true;
        if (v.worstFlags > v.worstTokens || v.worstTokens > v.tokens || v.worstTokens > Evidence.MAX_TOKENS) {
            return true;
        }
        if (v.worstFlags > v.flags || v.worstVoids > v.voids) return true;
        ICourt.Outcome outcome = ICourt.Outcome(v.outcome);
        if (outcome == ICourt.Outcome.WITHHELD || outcome == ICourt.Outcome.FORGED) return false;
        bool condemned = Evidence.hardFail(v.worstTokens, v.worstFlags, v.worstVoids, flagPpm);
        if (outcome == ICourt.Outcome.IMPROBABLE) return !condemned;
        return condemned || (v.voids > 0) != (outcome == ICourt.Outcome.VOID);
    }
}
