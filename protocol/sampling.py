"""Seed-locked sampling: the next token is a function of (logits, parameters, seed, position), and of nothing else.

Noise. For the token at absolute position p (prompt length + output index, so a continuation by another provider meets
the same noise), two 32-bit words k0, k1 are the first 8 bytes of SHA-256(tag || seed || p as u64). Token id i gets
x = h(h(i ^ k0) + k1) with h = lowbias32, v = min((x + 1/2) / 2^32, 1 - 2^-24) and g = -log(-log(1 - v)), a standard
Gumbel variable with 32 bits of resolution in the tail that wins. Implementations may compute v and g in fp32.

Why this generator: k0 and k1 come from SHA-256, so rows (seed, position) are independent as far as anybody can tell;
within a row i -> x is a bijection of 32-bit words, so every g has its exact marginal, and two keyed rounds of a
mixer whose measured avalanche bias is 0.17 leave no structure between ids that sampling could see (tested). Nothing
here is secret: neither side can choose the seed, and that prevents steering. It needs only 32-bit multiply, shift, xor.
Sources: C. Wellons, hash-prospector (lowbias32), https://github.com/skeeto/hash-prospector ; the Gumbel-max
trick: Gumbel 1954, and Maddison, Tarlow, Minka, A* Sampling, 2014.

Rule. The logits are those after the job's options (options.py: penalties, then minus infinity for what may not be
chosen). score(i) = logit_i + T * g(p, i), whose argmax is that of logit_i / T + g. The next token is the argmax of
score over the nucleus, the lowest id on ties. The nucleus, with p the softmax of logits / T over the whole vocabulary:
  token i is in iff fewer than top_k tokens have a larger logit, and
  the tokens with a larger logit hold less than top_p of the mass (top_k 0, top_p 1: no cut).
Both cuts are taken on the full distribution, so they commute; equal logits are in or out together; the likeliest token
is always in. T = 0 is plain argmax of the logits. Scores, and so margins, are in logits whatever T.

Generation uses this rule exactly. Verification (`margin`) tolerates the numeric noise of kernels at the edges: the
chosen token is judged as if raised by 0.15 logits with 0.01 more mass allowed, its rivals as if lowered by as much.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Final

from protocol.errors import FieldOutOfRange
from protocol.options import PENALTY_ONE, JobOptions, penalty_milli
from protocol.units import Digest

SAMPLER_VERSION: Final = "tally/sampler/gumbel-lowbias32/2"
"""Names this file's rule; its hash is part of the profile. Any change of a chosen token needs a new name."""

MICRO: Final = 1_000_000
MAX_TEMPERATURE_MICRO: Final = 100 * MICRO
"""Highest temperature, x 1e6. At 100 the noise drowns any logits; the bound keeps T * g far from fp32's edge."""

MIX_FIRST: Final = 0x7FEB352D
MIX_SECOND: Final = 0x846CA68B
MAX_UNIFORM: Final = 1.0 - 2.0**-24
"""Largest v: the largest fp32 below 1, so that -log(1 - v) is finite in fp32 too."""

EDGE_LOGIT: Final = 0.15
EDGE_MASS: Final = 0.01
"""Tolerances of `margin` at the top-k / top-p edge, in logits and in probability mass. Kernels of one profile differ by
less; doubling them lets a cheater pick from a visibly wider nucleus."""

_TAG_NOISE: Final = b"tally/noise/1"
_MASK: Final = 0xFFFFFFFF


def check_sampling(temperature_micro: int, top_p_micro: int, top_k: int) -> None:
    """Raises: FieldOutOfRange unless 0 <= temperature <= 100, 0 < top_p <= 1 and top_k is a uint32."""
    if not 0 <= temperature_micro <= MAX_TEMPERATURE_MICRO:
        raise FieldOutOfRange("Sampling", "temperature_micro", temperature_micro)
    if not 0 < top_p_micro <= MICRO:
        raise FieldOutOfRange("Sampling", "top_p_micro", top_p_micro)
    if not 0 <= top_k <= _MASK:
        raise FieldOutOfRange("Sampling", "top_k", top_k)


def derive_seed(job_id: bytes, client_nonce: bytes, provider_nonce: bytes) -> Digest:
    """SHA-256(job id || client nonce || provider nonce), each 32 bytes: neither side alone can aim at a seed.

    Raises: FieldOutOfRange.
    """
    for name, value in (("job_id", job_id), ("client_nonce", client_nonce), ("provider_nonce", provider_nonce)):
        if len(value) != 32:
            raise FieldOutOfRange("Seed", name, value)
    return Digest(hashlib.sha256(job_id + client_nonce + provider_nonce).digest())


def stream_keys(tag: bytes, seed: bytes, *indices: int) -> tuple[int, int]:
    """(k0, k1): the first two big-endian words of SHA-256(tag || seed || indices as u64). `seed`: 32 bytes.

    Raises: FieldOutOfRange.
    """
    if len(seed) != 32:
        raise FieldOutOfRange("Seed", "seed", seed)
    raw = hashlib.sha256(tag + seed + b"".join(index.to_bytes(8, "big") for index in indices)).digest()
    return int.from_bytes(raw[:4], "big"), int.from_bytes(raw[4:8], "big")


def noise_keys(seed: bytes, position: int) -> tuple[int, int]:
    """The two words that key the noise of one position."""
    return stream_keys(_TAG_NOISE, seed, position)


def lowbias32(x: int) -> int:
    """A 32-bit bijective mixer. Source: C. Wellons, hash-prospector."""
    x ^= x >> 16
    x = x * MIX_FIRST & _MASK
    x ^= x >> 15
    x = x * MIX_SECOND & _MASK
    return x ^ x >> 16


def mix(keys: tuple[int, int], index: int) -> int:
    """The generator's 32-bit word for `index` under `keys`."""
    return lowbias32(lowbias32(index ^ keys[0]) + keys[1] & _MASK)


def gumbel(word: int) -> float:
    """A standard Gumbel value from a 32-bit word: finite, in [-2.82, 22.88]."""
    v = min((word + 0.5) * 2.0**-32, MAX_UNIFORM)
    return -math.log(-math.log1p(-v))


def noise(seed: bytes, position: int, token_id: int) -> float:
    """g(position, token id). `position`: absolute index, in the sequence, of the token being sampled."""
    return gumbel(mix(noise_keys(seed, position), token_id))


def adjusted(
    logits: Mapping[int, float], options: JobOptions, counts: Mapping[int, int], banned: frozenset[int]
) -> dict[int, float]:
    """Logits as the sampling rule reads them: penalties taken off, then banned tokens at minus infinity.

    `counts`: output tokens so far, `continued` ones included. `banned`: stops and EOS before `min_tokens`, and what
    the grammar forbids here. The reference other implementations meet.
    """
    return {
        token: float("-inf") if token in banned else logit - penalty_milli(options, counts.get(token, 0)) / PENALTY_ONE
        for token, logit in logits.items()
    }


def _scores(logits: Sequence[float], seed: bytes, position: int, temperature_micro: int) -> list[float]:
    if temperature_micro == 0:
        return list(logits)
    temperature = temperature_micro / MICRO
    keys = noise_keys(seed, position)
    return [logit + temperature * gumbel(mix(keys, i)) for i, logit in enumerate(logits)]


def _softmax(logits: Sequence[float], temperature_micro: int) -> list[float]:
    top, scale = max(logits), MICRO / temperature_micro
    weights = [math.exp((logit - top) * scale) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


class _Nucleus:
    """Who is in the nucleus, with tolerances."""

    def __init__(self, logits: Sequence[float], temperature_micro: int, top_p_micro: int, top_k: int) -> None:
        self._logits = logits
        self._cut_k = top_k if 0 < top_k < len(logits) else 0
        self._top_p = top_p_micro / MICRO
        cut_p = top_p_micro < MICRO and temperature_micro > 0
        self._mass = _softmax(logits, temperature_micro) if cut_p else None

    def has(self, token_id: int, lift: float = 0.0, mass: float = 0.0) -> bool:
        """Whether the token is in when its logit is raised by `lift` and top_p by `mass`."""
        edge = self._logits[token_id] + lift
        above = [i for i, logit in enumerate(self._logits) if logit > edge and i != token_id]
        if not above:
            return True
        if self._cut_k and len(above) >= self._cut_k:
            return False
        return self._mass is None or math.fsum(self._mass[i] for i in above) < self._top_p + mass


def choose(
    logits: Sequence[float], seed: bytes, position: int, temperature_micro: int, top_p_micro: int, top_k: int
) -> int:
    """The next token: argmax of score over the nucleus, lowest id on ties. The reference other implementations meet."""
    scores = _scores(logits, seed, position, temperature_micro)
    if temperature_micro == 0:
        return max(range(len(scores)), key=lambda i: (scores[i], -i))
    nucleus = _Nucleus(logits, temperature_micro, top_p_micro, top_k)
    for token_id in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if nucleus.has(token_id):
            return token_id
    raise ValueError("logits hold no finite value")


def margin(
    logits: Sequence[float],
    chosen: int,
    seed: bytes,
    position: int,
    temperature_micro: int,
    top_p_micro: int,
    top_k: int,
) -> float:
    """Best rival's score minus the chosen token's, at least 0; in logits. About 0 for honest work.

    Infinite when `chosen` is outside the nucleus even with the tolerances. A rival counts only if it is in the nucleus
    even when lowered by the tolerances.
    """
    scores = _scores(logits, seed, position, temperature_micro)
    if temperature_micro == 0:
        return max(scores) - scores[chosen]
    nucleus = _Nucleus(logits, temperature_micro, top_p_micro, top_k)
    if not nucleus.has(chosen, EDGE_LOGIT, EDGE_MASS):
        return math.inf
    for rival in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if scores[rival] <= scores[chosen]:
            break
        if nucleus.has(rival, -EDGE_LOGIT, -EDGE_MASS):
            return scores[rival] - scores[chosen]
    return 0.0
