"""What both sides of a comparison are given: the same prompts, lengths and sampling; and how samples are summed up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from node.ports import Sampling

SLOTS: Final = 16
"""Slots of the bare engine and of the provider: as many as the most streams measured."""

TEMPERATURE: Final = 0.8
TOP_P: Final = 0.95
SAMPLING: Final = Sampling(temperature_micro=800_000, top_p_micro=950_000)
"""The same as TEMPERATURE and TOP_P: what people ask for, so the sampler's work is part of both sides."""

_BOOK: Final = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was"
    " upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be"
    " light: and there was light. And God saw the light, that it was good: and God divided the light from the darkness."
    " And God called the light Day, and the darkness he called Night. And the evening and the morning were the"
)
_DAYS: Final = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


@dataclass(frozen=True, slots=True)
class Workload:
    """How much is measured. `rounds`: requests each stream makes one after the other in one sample.

    `repeats`: samples of each side for each number of streams. `ttft_samples`: pairs of first-token times.
    """

    model_dir: Path
    model: str
    streams: tuple[int, ...] = (1, 8, 16)
    max_tokens: int = 128
    rounds: int = 3
    repeats: int = 7
    ttft_samples: int = 60
    documents: int = 400
    gas_counts: tuple[int, ...] = (1, 10, 100)


@dataclass(slots=True)
class Sample:
    """One side's run of some streams. `first_s`: each request's time to its first token. `cpu`: seconds by process."""

    tokens: int
    seconds: float
    first_s: list[float]
    prompt_tokens: int = 0
    cpu: dict[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def prompt(number: int) -> str:
    """A text of its own for each number, all of about one length: no prompt is a prefix of another."""
    words = " ".join(_DAYS[int(digit)] for digit in f"{number:06d}")
    return f"The book of the {words} day. {_BOOK} {_DAYS[number % 10]} day. And"


def prompts(first: int, streams: int, rounds: int) -> list[list[str]]:
    """Each stream's prompts, numbered from `first`."""
    return [[prompt(first + stream * rounds + turn) for turn in range(rounds)] for stream in range(streams)]


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours; `values` need not be sorted."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median and interquartile range, with the number of values."""
    return {
        "median": round(statistics.median(values), digits),
        "iqr": [round(quantile(values, 0.25), digits), round(quantile(values, 0.75), digits)],
        "n": len(values),
    }
