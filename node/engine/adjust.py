"""What moves a stream's logits before a token is chosen: penalties, tokens to come before a stop, a grammar.

The reference is protocol.sampling.adjusted. A stream that asks for none of this has no Adjustment, and its rows are
never touched; fingerprints and reported log-probabilities are of the logits as they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from node.engine.grammar import Matcher
from protocol.options import PENALTY_ONE, JobOptions, penalty_milli


class Adjustment:
    """One stream's. `continued`: output tokens at the prompt's end; `stops`: what may not come before min_tokens.

    Where the grammar allows stops alone, min_tokens gives way: there is nothing else to choose.
    """

    def __init__(
        self,
        options: JobOptions,
        continued: Sequence[int],
        stops: frozenset[int],
        matcher: Matcher | None,
        vocab: int,
        device: torch.device,
    ) -> None:
        self._options, self._matcher, self._device = options, matcher, device
        self._stops = np.array(sorted(stops), dtype=np.int64)
        self._early = max(0, options.min_tokens - len(continued)) if stops else 0
        self._counts: Counter[int] = Counter()
        self._penalties = torch.zeros(vocab, device=device) if options.penalised else None
        for token_id in continued if options.penalised else ():
            self._count(token_id)

    @property
    def idle(self) -> bool:
        """Whether no later token will be moved."""
        return self._penalties is None and self._matcher is None and not self._early

    @property
    def error(self) -> str:
        """Why the stream cannot go on, or empty."""
        return self._matcher.error if self._matcher else ""

    def fill(self, row: torch.Tensor) -> None:
        """Write the bias of the next token over `row`, [vocab] fp32 zeros."""
        if self._penalties is not None:
            row.copy_(self._penalties)
        if self._matcher is None:
            if self._early:
                row[torch.from_numpy(self._stops).to(self._device)] = -torch.inf
            return
        allowed = self._matcher.allowed()
        if self._matcher.error:
            return  # whatever is chosen will not be emitted
        if self._early:
            rest = allowed.copy()
            rest[self._stops] = False
            allowed = rest if rest.any() else allowed
        row.masked_fill_(torch.from_numpy(~allowed).to(self._device), -torch.inf)

    def take(self, token_id: int) -> None:
        """The token that was chosen."""
        self._early = max(0, self._early - 1)
        if self._penalties is not None:
            self._count(token_id)
        if self._matcher is not None:
            self._matcher.take(token_id)

    def _count(self, token_id: int) -> None:
        assert self._penalties is not None
        self._counts[token_id] += 1
        self._penalties[token_id] = -penalty_milli(self._options, self._counts[token_id]) / PENALTY_ONE


def adjustment(
    options: JobOptions,
    prompt: Sequence[int],
    stops: frozenset[int],
    matcher: Matcher | None,
    vocab: int,
    device: torch.device,
) -> Adjustment | None:
    """What the options of a job with this prompt ask for, None when they move no logit."""
    if not (options.penalised or options.min_tokens or matcher is not None):
        return None
    continued = prompt[len(prompt) - options.continued :]
    return Adjustment(options, continued, stops, matcher, vocab, device)


def bias(adjustments: Sequence[Adjustment], vocab: int, device: torch.device) -> torch.Tensor:
    """[rows, vocab] fp32 to be added to the logits of these streams."""
    rows = torch.zeros(len(adjustments), vocab, device=device)
    for row, adjustment in zip(rows, adjustments, strict=True):
        adjustment.fill(row)
    return rows
