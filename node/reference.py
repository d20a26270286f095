"""What a model card tells of an offer's worth: tokens of the reference text, and the work in the reference job.

Cards are fetched from providers and believed by their hashes only (client/cards.py); an offer whose card cannot be had
is shown without these figures, never with another offer's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from incentives.basket import BASKET, Measured, measured, mix_ste_micro
from incentives.reference_text import TEXTS
from node.ports import MarketEntry, ModelCard
from protocol.errors import TallyError
from protocol.units import Digest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CARD_WAIT_S: Final = 12.0
"""How long a market answer waits for all model cards together. Unit: s. A tokenizer of 20 MB takes that long over a
slow link; doubling it doubles how long one slow provider delays a first comparison."""

REMEMBERED: Final = 64
"""Profiles whose tokenizer stays loaded. A large vocabulary takes about 50 MB, most under 10."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One profile by its card. `ste_micro`: STE x 10^6 of the reference job."""

    text: Measured
    ste_micro: int
    encoder: Tokenizer

    def count(self, text: str) -> int:
        """Tokens of a text as a prompt's own words, without template or special tokens."""
        return len(self.encoder.encode(text, add_special_tokens=False).ids)


CardOf = Callable[[Digest], Awaitable[ModelCard]]
"""The card of a profile. Raises: NoProvider."""


class References:
    """References by profile; each card is asked for until it was had once. Without `card_of` none is known."""

    def __init__(self, card_of: CardOf | None) -> None:
        self._card_of = card_of
        self._known: dict[Digest, Reference] = {}

    async def learn(self, entries: Iterable[MarketEntry]) -> None:
        """Have references for as many entries as can be had in time. Never raises for what a provider does."""
        if self._card_of is None:
            return
        profiles = sorted({entry.profile for entry in entries if entry.profile not in self._known})
        try:
            async with asyncio.timeout(CARD_WAIT_S):
                await asyncio.gather(*(self._learn(profile, self._card_of) for profile in profiles))
        except TimeoutError:
            pass

    async def _learn(self, profile: Digest, card_of: CardOf) -> None:
        try:
            found = await asyncio.to_thread(_reference, await card_of(profile))
        except (TallyError, ValueError):
            return
        self._known[profile] = found
        while len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]

    async def as_json(self, profile: Digest, text: str | None) -> dict[str, Any] | None:
        """The reference of a profile, None when it is not known. `text`: a prompt to count as well."""
        found = self._known.get(profile)
        if found is None:
            return None
        prompt = None if text is None else await asyncio.to_thread(found.count, text)
        counts = {kind: count for (kind, _), count in zip(TEXTS, found.text.tokens, strict=True)}
        return {"basket": BASKET, "ste_micro": found.ste_micro, "tokens": counts, "prompt_tokens": prompt}


def _reference(card: ModelCard) -> Reference:
    """Raises: CardUnusable; ValueError when its tokenizer makes no tokens of the reference text."""
    from node.gateway.vocabulary import load_vocabulary

    encoder = load_vocabulary(card.tokenizer_json, card.eos_ids, "reference").decoder
    counts = [len(encoder.encode(text, add_special_tokens=False).ids) for _, text in TEXTS]
    return Reference(measured(counts), mix_ste_micro(card.profile), encoder)
