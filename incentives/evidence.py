"""How unlikely flagged tokens are in honest work: the tail of one job, and the evidence of a provider's whole past.

An audited token of honest work is flagged with probability p0 at most (the profile's `flag_ppm`) and void with 10^-6.
One job is condemned when its flags have a probability below 10^-9 under that (`hard_fail`). Cheats too rare for it are
caught by an e-process, a bettor's wealth against "this provider is honest": each judged case multiplies it by

    (1 + lambda / p0 - lambda)^x * (1 - lambda)^(n - x)        n tokens, x flags

whose mean is at most 1 in honest work. Seven bets run side by side. Each case k also starts the bets anew with a weight
of 1 / (k (k + 1)), so that a long honest past does not have to be lost first; the weights add up to 1, so the whole is
still a non-negative supermartingale that starts at 1, and honest work ever reaches 10^6 with probability 10^-6 at most.
Sources: Ville 1939; Shafer and Vovk 2019; restarts: Shin, Ramdas and Rinaldo 2022 (e-detectors).

Everything is integer and the same in contracts/src/Evidence.sol, bit for bit (tests/vectors/evidence.json): a number is
m * 2^e with m from 2^126 to 2^127, tails are rounded up and wealth down, so every error favours the accused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.errors import FieldOutOfRange

WAD: Final = 10**18
"""One, in the fixed point of wealth and evidence."""

TAIL_ONE: Final = 10**27
"""One, in the fixed point of tail probabilities."""

HARD_FAIL: Final = 10**18
"""Tail below which one job condemns: 10^-9. Doubling it doubles how often an honest job does."""

SLASH_AT: Final = 10**6 * WAD
"""Evidence that condemns. Doubling it halves the bound on honest providers, at ln 2 more evidence against a cheat."""

VOID_PPM: Final = 1
"""Rate of void tokens (far off, VOID_MILLI of verdicts.py) granted to honest work. Parts per million."""

MAX_FLAG_PPM: Final = 20_000
"""Highest rate of flags a profile may claim. Parts per million. Doubling it halves what each flag says."""

MAX_TOKENS: Final = 1 << 20
"""Most tokens of one job that a tail is computed for. Above every output sold; doubling it doubles the most gas."""

MAX_CASE_TOKENS: Final = (1 << 32) - 1
"""Most tokens of one case: the Verdict's field."""

MOST_WEALTH: Final = 10**36
"""Wealth of one bet stops here (10^18 times the stake; below 2^120, so it packs). Doubling it changes no verdict."""

FLAG_STAKES: Final = tuple(WAD // 1000 * milli for milli in (5, 10, 30, 100, 300))
"""lambda of the five bets on flags, x 10^18: how much of the wealth is put on the next token being flagged."""

VOID_STAKES: Final = (WAD // 10_000, WAD // 1000)
"""lambda of the two bets on void tokens, x 10^18."""

BETS: Final = len(FLAG_STAKES) + len(VOID_STAKES)

_MILLION: Final = 10**6
_ONE: Final = (1 << 126, -126)


# ------------------------------------------------------------------------------------------- numbers m * 2^e


def _ceil_shift(value: int, by: int) -> int:
    return -(-value >> by)


def _normal(value: int, exponent: int) -> tuple[int, int]:
    """`value` above zero, brought to 2^126 <= m < 2^127; rounded down."""
    shift = value.bit_length() - 127
    return (value >> shift if shift > 0 else value << -shift), exponent + shift


def _times(a: tuple[int, int], b: tuple[int, int], up: bool) -> tuple[int, int]:
    product = a[0] * b[0]
    shift = 127 if product >> 253 else 126
    return _ceil_shift(product, shift) if up else product >> shift, a[1] + b[1] + shift


def _power(base: tuple[int, int], exponent: int, up: bool) -> tuple[int, int]:
    result = _ONE
    while exponent:
        if exponent & 1:
            result = _times(result, base, up)
        exponent >>= 1
        if exponent:
            base = _times(base, base, up)
    return result


# ------------------------------------------------------------------------------------------------------ tail


def tail_up(n: int, k: int, ppm: int) -> int:
    """At least P(X >= k) for X binomial(n, ppm / 10^6), in 10^-27, rounded up.

    1 for k up to the mode; above it the error is below 10^-5 of the value, or one unit. Time grows with k.
    Raises: FieldOutOfRange for k above n, n above MAX_TOKENS, or a rate out of 1 to MAX_FLAG_PPM.
    """
    _check(n, k, ppm, MAX_TOKENS)
    rest = _MILLION - ppm
    if k == 0 or (n - k) * ppm >= (k + 1) * rest:
        return TAIL_ONE
    m, e = _power((-(-(rest << 127) // _MILLION), -127), n, True)
    for i in range(k):
        m = -(-m * ((n - i) * ppm) // ((i + 1) * rest))
        if m >> 190:
            m, e = _ceil_shift(m, 64), e + 64
        elif not m >> 126:
            m, e = m << 64, e - 64
    scaled = _ceil_shift(m, 80) * _ceil_shift(_series(n, k, ppm, rest), 64) * TAIL_ONE
    return min(_ceil_shift(scaled, -(e + 48)), TAIL_ONE)


def _series(n: int, k: int, ppm: int, rest: int) -> int:
    """P(X >= k) / P(X = k), x 2^96, rounded up: term by term until a geometric series bounds the rest."""
    term = total = 1 << 96
    while True:
        term = -(-term * ((n - k) * ppm) // ((k + 1) * rest))
        total += term
        k += 1
        if k >= n:
            return total
        more, less = (n - k) * ppm, (k + 1) * rest
        remainder = -(-term * more // (less - more))
        if remainder << 17 <= total:
            return total + remainder


def hard_fail(n: int, flags: int, voids: int, flag_ppm: int) -> bool:
    """Whether honest work has so many flags, or voids, in `n` tokens of one job with a probability below 10^-9.

    Raises: FieldOutOfRange.
    """
    return _is_rare(n, flags, flag_ppm) or _is_rare(n, voids, VOID_PPM)


def far_above(n: int, ppm: int) -> int:
    """Twice the mean number of flags in `n` tokens and 64 more: as many are rarer than 10^-9 in honest work, whatever
    `n` and `ppm` (Chernoff: e^-m (e m / k)^k at k = 2 m + 64)."""
    return 2 * -(-n * ppm // _MILLION) + 64


def _is_rare(n: int, k: int, ppm: int) -> bool:
    """A count beyond `far_above` is judged as that one: on chain a tail costs gas per flag, and nobody could pay for
    the verdict on a long output of which every token is flagged. Raises: FieldOutOfRange."""
    _check(n, k, ppm, MAX_TOKENS)
    return tail_up(n, min(k, far_above(n, ppm)), ppm) < HARD_FAIL


# -------------------------------------------------------------------------------------------------- evidence


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the judged cases of one provider come to. `cases`: judged so far. `sums`: per bet, x 10^18, the wealth of
    all its restarts, five on flags and then two on voids."""

    cases: int = 0
    sums: tuple[int, ...] = (0,) * BETS

    def after(self, n: int, flags: int, voids: int, flag_ppm: int) -> Evidence:
        """With one more case of `n` tokens, so many of them flagged and void. Raises: FieldOutOfRange."""
        _check(n, flags, flag_ppm, MAX_CASE_TOKENS)
        _check(n, voids, VOID_PPM, MAX_CASE_TOKENS)
        case = self.cases + 1
        entering = WAD // (case * (case + 1))
        bets = [(stake, flag_ppm, flags) for stake in FLAG_STAKES] + [(stake, VOID_PPM, voids) for stake in VOID_STAKES]
        sums = (_staked(wealth + entering, *bet, n) for wealth, bet in zip(self.sums, bets, strict=True))
        return Evidence(case, tuple(sums))

    @property
    def value(self) -> int:
        """Evidence against the provider, x 10^18; 1 before the first case."""
        return sum(self.sums) // BETS + WAD // (self.cases + 1)


def _staked(wealth: int, stake: int, ppm: int, x: int, n: int) -> int:
    """floor(wealth * (1 + stake / p0 - stake)^x * (1 - stake)^(n - x)), at most MOST_WEALTH."""
    if wealth == 0:
        return 0
    won = _normal((WAD + stake * _MILLION // ppm - stake << 127) // WAD, -127)
    lost = ((WAD - stake << 127) // WAD, -127)
    m, e = _times(_power(lost, n - x, False), _power(won, x, False), False)
    m, e = _times((m, e), _normal(wealth, 0), False)
    return MOST_WEALTH if e >= -6 else min(m >> -e, MOST_WEALTH)


def _check(n: int, k: int, ppm: int, most: int) -> None:
    """Raises: FieldOutOfRange."""
    for name, value, top in (("tokens", n, most), ("flags", k, n), ("flag_ppm", ppm - 1, MAX_FLAG_PPM - 1)):
        if not 0 <= value <= top:
            raise FieldOutOfRange("Evidence", name, value)
