"""What the same work costs under different price sheets: per standard token equivalent, per million tokens, per
megabyte of reference text, and for one job.

All compare a fixed reference job of 1,500 prompt and 500 output tokens, nothing cached. With the sheet's prices
p (prompt) and o (output), its fixed part f per job and its multiplier M (scale 10^16),

    N       = M * (1500 p + 500 o) + 10^16 f                the job's exact cost, scale 10^16
    per STE = ceil(10^6 N / (10^16 S))                      S: the job's STE x 10^6 under the offer's own profile
    per 1e6 tokens of the mix = ceil(500 N / 10^16)
    per MB  = ceil(10^6 t N / (2000 b 10^16))               t: tokens of the b bytes of reference text

t is counted by the offer's own tokenizer. Each is rounded once, up. Amounts are integers of one unit per sheet: wei, or
a fraction of a dollar for the sheets of outside platforms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from incentives.reference_text import TEXT_BYTES, TEXTS
from protocol.messages import Profile, Tariff
from protocol.metering import Usage, flops, ste_micro_up
from protocol.tariff import MULTIPLIER_ONE, Basis, multiplier_of
from protocol.units import JobKind

BASKET: Final = "tally-basket/1"
"""Name of text, mix and job size together; a change of any of them takes another name."""

MIX: Final = Usage(prompt=1_500, cached=0, completion=500, reasoning=0)
"""The reference job. Three parts read to one part written, as chat with some context is; short enough for every
context and for no long-context factor that is in use."""

MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of one offer or sheet, per token and per job, in its own unit. `multiplier`: scale 10^16."""

    prompt: int
    cached: int
    output: int
    reasoning: int
    per_request: int
    multiplier: int = MULTIPLIER_ONE


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens of each reference text in the order of TEXTS, by one tokenizer."""

    tokens: tuple[int, ...]

    @property
    def total(self) -> int:
        """Tokens of TEXT_BYTES bytes."""
        return sum(self.tokens)


def prices_of(tariff: Tariff, basis: Basis, prompt_tokens: int) -> Prices:
    """What a job of that basis and prompt length pays. Raises: TierNotOffered, FieldOutOfRange."""
    return Prices(
        prompt=tariff.embedding_price if basis.kind is JobKind.EMBED else tariff.prompt_price,
        cached=tariff.cached_price,
        output=tariff.completion_price,
        reasoning=tariff.reasoning_price,
        per_request=tariff.per_request,
        multiplier=multiplier_of(tariff, basis, prompt_tokens),
    )


def measured(tokens: Sequence[int]) -> Measured:
    """Raises: ValueError unless there is one count per reference text, each positive and at most its bytes."""
    sizes = [len(text.encode()) for _, text in TEXTS]
    if len(tokens) != len(sizes) or any(not 0 < n <= size for n, size in zip(tokens, sizes, strict=True)):
        raise ValueError(f"{tuple(tokens)} are no token counts of the {len(sizes)} reference texts")
    return Measured(tuple(tokens))


def _exact(prices: Prices, usage: Usage) -> int:
    """Cost of a job, scale 10^16."""
    lines = (
        (usage.prompt - usage.cached) * prices.prompt
        + usage.cached * prices.cached
        + (usage.completion - usage.reasoning) * prices.output
        + usage.reasoning * prices.reasoning
    )
    return prices.multiplier * lines + MULTIPLIER_ONE * prices.per_request


def job_up(prices: Prices, usage: Usage) -> int:
    """Cost of one job without refund, rounded up; for a tariff the same as `cost_up` gives."""
    return -(-_exact(prices, usage) // MULTIPLIER_ONE)


def million_up(price: int, multiplier: int) -> int:
    """A price per token as it is paid, per million tokens, rounded up."""
    return -(-price * multiplier * MILLION // MULTIPLIER_ONE)


def tokens_up(prices: Prices) -> int:
    """Per million tokens of the mix, fixed part included, rounded up."""
    return -(-_exact(prices, MIX) * MILLION // (MULTIPLIER_ONE * (MIX.prompt + MIX.completion)))


def ste_up(prices: Prices, ste_micro: int) -> int:
    """Per STE, rounded up. `ste_micro`: what `mix_ste_micro` gives for the offer's profile."""
    return -(-_exact(prices, MIX) * MILLION // (MULTIPLIER_ONE * ste_micro))


def mix_ste_micro(profile: Profile) -> int:
    """STE x 10^6 of the reference job, at least 1."""
    return max(1, ste_micro_up(flops(profile, MIX)))


def text_up(prices: Prices, text: Measured) -> int:
    """Per megabyte (10^6 bytes) of reference text in the mix, rounded up."""
    scale = MULTIPLIER_ONE * (MIX.prompt + MIX.completion) * TEXT_BYTES
    return -(-_exact(prices, MIX) * text.total * MILLION // scale)
