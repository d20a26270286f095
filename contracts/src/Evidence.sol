// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {FixedPointMathLib} from "solady/utils/FixedPointMathLib.sol";

/// @notice What the judged cases of one provider come to. `cases`: judged so far. `sums`: per bet, in 1e-18, the wealth
/// of all its restarts.
struct EProcess {
    uint64 cases;
    uint128[7] sums;
}

/// @notice How unlikely flagged tokens are in honest work: incentives/evidence.py, bit for bit
/// (tests/vectors/evidence.json is read by both). The arithmetic is integer; a number is m * 2^e with m from 2^126 to
/// 2^127, so nothing underflows on the way, and each operation is rounded to the side that protects the accused: tails
/// up, wealth down.
library Evidence {
    /// @notice Fixed point of wealth and evidence.
    uint256 internal constant WAD = 1e18;

    /// @notice Fixed point of tail probabilities.
    uint256 internal constant TAIL_ONE = 1e27;

    /// @notice A job whose flags have a smaller probability than this in honest work is condemned: 1e-9. Doubling it
    /// doubles how often an honest job is.
    uint256 internal constant HARD_FAIL = 1e18;

    /// @notice Evidence at which a provider is condemned: 10^6, so an honest one ever is with probability 10^-6 at most.
    uint256 internal constant SLASH_AT = 1e24;

    /// @notice Rate of void tokens granted to honest work. Parts per million.
    uint256 internal constant VOID_PPM = 1;

    /// @notice Highest rate of flags a profile may claim for honest work. Parts per million. Doubling it halves what
    /// each flag says.
    uint256 internal constant MAX_FLAG_PPM = 20_000;

    /// @notice Most tokens of one job that a tail is computed for. Doubling it doubles the most gas that costs.
    uint256 internal constant MAX_TOKENS = 1 << 20;

    /// @notice Wealth above which a bet stops counting, 10^18 in 1e-18. Doubling it changes no verdict.
    uint256 internal constant MOST_WEALTH = 1e36;

    /// @notice Counts that no job and no case can have, or a rate out of bounds.
    error ImpossibleCounts();

    uint256 private constant MILLION = 1e6;
    uint256 private constant FLAG_BETS = 5;
    uint256 private constant BETS = 7;
    uint256 private constant TOP = 126;

    /// @notice At least P(X >= k) for X binomial(n, ppm / 10^6), in 1e-27, rounded up; 1 for k up to the mode.
    /// Above the mode the error is below 10^-5 of the value, or one unit.
    function tailUp(uint256 n, uint256 k, uint256 ppm) internal pure returns (uint256) {
        if (k > n || n > MAX_TOKENS || ppm == 0 || ppm > MAX_FLAG_PPM) revert ImpossibleCounts();
        unchecked {
            uint256 rest = MILLION - ppm;
            if (k == 0 || (n - k) * ppm >= (k + 1) * rest) return TAIL_ONE;
            (uint256 m, int256 e) = _power(_ceilDiv(rest << 127, MILLION), -127, n, true);
            for (uint256 i; i < k; ++i) {
                m = _ceilDiv(m * ((n - i) * ppm), (i + 1) * rest);
                if (m >= 1 << 190) {
                    m = _ceilShift(m, 64);
                    e += 64;
                } else if (m < 1 << 126) {
                    m <<= 64;
                    e -= 64;
                }
            }
            uint256 scaled = _ceilShift(m, 80) * _ceilShift(_series(n, k, ppm, rest), 64) * TAIL_ONE;
            // The probability of k is at most 1, so e <= -126 and the shift is positive.
            uint256 shift = uint256(-(e + 48));
            uint256 tail = shift > 255 ? 1 : _ceilShift(scaled, shift);
            return tail < TAIL_ONE ? tail : TAIL_ONE;
        }
    }

    /// @notice Whether honest work has so many flags, or voids, in `n` tokens of one job with probability below 1e-9.
    function hardFail(uint256 n, uint256 flags, uint256 voids, uint256 flagPpm) internal pure returns (bool) {
        return _isRare(n, flags, flagPpm) || _isRare(n, voids, VOID_PPM);
    }

    /// @notice Twice the mean number of flags in `n` tokens and 64 more. As many, or more, are rarer than 1e-9 in honest
    /// work, whatever `n` and `ppm` (Chernoff: e^-m (e m / k)^k at k = 2 m + 64).
    function farAbove(uint256 n, uint256 ppm) internal pure returns (uint256) {
        return 2 * _ceilDiv(n * ppm, MILLION) + 64;
    }

    /// @dev A tail costs gas per flag, and is far below the bound long before all tokens of a long output are flagged:
    /// a count beyond `farAbove` is judged as that one, or nobody could pay for the verdict on the worst of cheats.
    function _isRare(uint256 n, uint256 k, uint256 ppm) private pure returns (bool) {
        if (k > n || n > MAX_TOKENS || ppm == 0 || ppm > MAX_FLAG_PPM) revert ImpossibleCounts();
        uint256 far = farAbove(n, ppm);
        return tailUp(n, k < far ? k : far, ppm) < HARD_FAIL;
    }

    /// @notice The process after one more case of `n` tokens with so many flags and voids.
    function update(EProcess memory process, uint256 n, uint256 flags, uint256 voids, uint256 flagPpm)
        internal
        pure
        returns (EProcess memory next)
    {
        if (flags > n || voids > n || n >> 32 != 0 || flagPpm == 0 || flagPpm > MAX_FLAG_PPM) {
            revert ImpossibleCounts();
        }
        unchecked {
            uint256 k = uint256(process.cases) + 1;
            next.cases = uint64(k);
            uint256 entering = WAD / (k * (k + 1));
            for (uint256 bet; bet < BETS; ++bet) {
                bool onFlags = bet < FLAG_BETS;
                uint256 wealth = process.sums[bet] + entering;
                next.sums[bet] =
                    uint128(_staked(wealth, _stake(bet), onFlags ? flagPpm : VOID_PPM, n, onFlags ? flags : voids));
            }
        }
    }

    /// @notice Evidence against the provider, in 1e-18: 1 before the first case.
    function value(EProcess memory process) internal pure returns (uint256) {
        uint256 sum;
        for (uint256 bet; bet < BETS; ++bet) {
            sum += process.sums[bet];
        }
        return sum / BETS + WAD / (uint256(process.cases) + 1);
    }

    // ------------------------------------------------------------------------------------------------------ one bet

    /// @dev lambda = b * p0 of each bet, in 1e-18.
    function _stake(uint256 bet) private pure returns (uint256) {
        if (bet == 0) return 0.005e18;
        if (bet == 1) return 0.01e18;
        if (bet == 2) return 0.03e18;
        if (bet == 3) return 0.1e18;
        if (bet == 4) return 0.3e18;
        return bet == 5 ? 0.0001e18 : 0.001e18;
    }

    /// @dev floor(wealth * (1 + lambda / p0 - lambda)^x * (1 - lambda)^(n - x)), at most MOST_WEALTH.
    function _staked(uint256 wealth, uint256 lambda, uint256 ppm, uint256 n, uint256 x) private pure returns (uint256) {
        if (wealth == 0) return 0;
        unchecked {
            (uint256 m, int256 e) = _power(((WAD - lambda) << 127) / WAD, -127, n - x, false);
            (uint256 base, int256 exponent) = _normal(((WAD + lambda * MILLION / ppm - lambda) << 127) / WAD, -127);
            (base, exponent) = _power(base, exponent, x, false);
            (m, e) = _times(m, e, base, exponent, false);
            (base, exponent) = _normal(wealth, 0);
            (m, e) = _times(m, e, base, exponent, false);
            // From 2^126 * 2^-6 on it is above MOST_WEALTH, which is below 2^120.
            if (e >= -6) return MOST_WEALTH;
            if (e < -255) return 0;
            uint256 result = m >> uint256(-e);
            return result < MOST_WEALTH ? result : MOST_WEALTH;
        }
    }

    /// @dev P(X >= k) / P(X = k), times 2^96, rounded up: term by term until a geometric series bounds the rest.
    function _series(uint256 n, uint256 k, uint256 ppm, uint256 rest) private pure returns (uint256 total) {
        unchecked {
            uint256 term = 1 << 96;
            total = term;
            while (true) {
                term = _ceilDiv(term * ((n - k) * ppm), (k + 1) * rest);
                total += term;
                ++k;
                if (k >= n) return total;
                uint256 more = (n - k) * ppm;
                uint256 remainder = _ceilDiv(term * more, (k + 1) * rest - more);
                if (remainder << 17 <= total) return total + remainder;
            }
        }
    }

    // ------------------------------------------------------------------------------------------- numbers m * 2^e

    /// @dev `x` above zero, brought to 2^126 <= m < 2^127; rounded down.
    function _normal(uint256 x, int256 e) private pure returns (uint256, int256) {
        unchecked {
            uint256 top = FixedPointMathLib.log2(x);
            // forge-lint: disable-next-line(unsafe-typecast)
            int256 shifted = e + int256(top) - int256(TOP);
            return (top > TOP ? x >> (top - TOP) : x << (TOP - top), shifted);
        }
    }

    function _times(uint256 a, int256 ea, uint256 b, int256 eb, bool up) private pure returns (uint256, int256) {
        unchecked {
            uint256 product = a * b;
            uint256 shift = product >> 253 != 0 ? 127 : 126;
            // forge-lint: disable-next-line(unsafe-typecast)
            return (up ? _ceilShift(product, shift) : product >> shift, ea + eb + int256(shift));
        }
    }

    function _power(uint256 base, int256 e, uint256 n, bool up) private pure returns (uint256 m, int256 exponent) {
        unchecked {
            (m, exponent) = (1 << TOP, -126);
            while (n != 0) {
                if (n & 1 == 1) (m, exponent) = _times(m, exponent, base, e, up);
                n >>= 1;
                if (n != 0) (base, e) = _times(base, e, base, e, up);
            }
        }
    }

    function _ceilDiv(uint256 a, uint256 b) private pure returns (uint256) {
        unchecked {
            return (a + b - 1) / b;
        }
    }

    function _ceilShift(uint256 x, uint256 by) private pure returns (uint256) {
        unchecked {
            return (x + (1 << by) - 1) >> by;
        }
    }
}
