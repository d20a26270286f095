"""What a job used and what that was worth in work: token counts, and standard token equivalents (STE).

One STE is 16e9 floating point operations: one token through a dense model of 8e9 parameters (2 operations a parameter).
The count follows from shape and usage alone, so every party recomputes it; it is of the model's arithmetic, not of
what a machine did: quantisation, padding and a recomputed prefix change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from protocol.errors import FieldOutOfRange
from protocol.messages import Profile

FLOPS_PER_STE: Final = 16_000_000_000
"""Operations in one STE. Unit: FLOP. Doubling it halves every STE count and doubles prices per STE."""

_FLOPS_PER_MICRO: Final = FLOPS_PER_STE // 1_000_000
_U32: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one job so far. `cached` is part of `prompt`, `reasoning` part of `completion`; nothing twice.

    Raises: FieldOutOfRange when a count is no uint32, cached > prompt, or reasoning > completion.
    """

    prompt: int
    cached: int
    completion: int
    reasoning: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or not 0 <= value <= _U32:
                raise FieldOutOfRange("Usage", field.name, value)
        if self.cached > self.prompt:
            raise FieldOutOfRange("Usage", "cached", self.cached)
        if self.reasoning > self.completion:
            raise FieldOutOfRange("Usage", "reasoning", self.reasoning)


def _attended(upto: int, window: int) -> int:
    """Keys looked at by the tokens at positions 0..upto-1 in one layer: sum of min(position + 1, window).

    `window` 0 means that a token sees all before it.
    """
    if window == 0 or upto <= window:
        return upto * (upto + 1) // 2
    return window * (window + 1) // 2 + (upto - window) * window


def flops(profile: Profile, usage: Usage) -> int:
    """Floating point operations of a job, exact by formula.

    With n prompt, c cached, u = n - c, m output tokens:
    2 * body * (u + m) + 2 * head * m + 4 * heads * head_dim * layers * (A(n + m) - A(c)), where A(k) counts the keys
    that k causal queries see, k (k + 1) / 2 without a window. The last output token is counted through the body: its
    keys and values are what a prefix cache hands to the next turn. Only the m positions that are sampled
    from pass the head.

    Source: matrix products counted one by one, as torch.utils.flop_counter does; 2 operations per multiply-add.
    """
    computed = usage.prompt - usage.cached + usage.completion
    total = usage.prompt + usage.completion
    dense = 2 * profile.body_parameters * computed
    head = 2 * profile.head_parameters * usage.completion
    keys = _attended(total, profile.window) - _attended(usage.cached, profile.window)
    return dense + head + 4 * profile.heads * profile.head_dim * profile.layers * keys


def embedding_flops(profile: Profile, lengths: Sequence[int]) -> int:
    """Floating point operations of reading texts of those lengths, each by itself, without a head."""
    return sum(flops(profile, Usage(length, 0, 0, 0)) for length in lengths)


def ste_micro_up(operations: int) -> int:
    """Standard token equivalents x 1_000_000, rounded up once: ceil(operations / 16e9 * 1e6)."""
    return -(-operations // _FLOPS_PER_MICRO)


def job_ste_micro(profile: Profile, usage: Usage, texts: Sequence[int] | None) -> int:
    """A job's work in micro-STE. `texts`: lengths of the texts an embedding job has read, None for generation."""
    return ste_micro_up(flops(profile, usage) if texts is None else embedding_flops(profile, texts))


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How many output tokens lie in reasoning blocks. `start`, `end`: the profile's markers, both 0 for none.

    A block's markers count as part of it; a block may be open when the output begins, because the template opened it.
    """

    start: int
    end: int
    open: bool = False
    tokens: int = 0

    def take(self, token_ids: Iterable[int]) -> Reasoning:
        """With more output."""
        if self.start == self.end:
            return self
        inside, count = self.open, self.tokens
        for token_id in token_ids:
            inside = inside or token_id == self.start
            count += inside
            inside = inside and token_id != self.end
        return replace(self, open=inside, tokens=count)


def opens_reasoning(profile: Profile, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends inside a reasoning block: its last marker opens one."""
    if profile.reasoning_start == profile.reasoning_end:
        return False
    markers = (profile.reasoning_start, profile.reasoning_end)
    last = next((token for token in reversed(prompt) if token in markers), None)
    return last == profile.reasoning_start
