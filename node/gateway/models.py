"""The models on offer as the gateway needs them: a card and a loaded tokenizer, found by name within a time limit."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, ParamSpec, TypeVar

from node.gateway import errors
from node.gateway.limits import Limits
from node.gateway.text import TextCodec
from node.gateway.waiting import within
from node.ports import Clock, Entropy, MarketEntry, Marketplace, ModelCard, NoProvider
from protocol.errors import TallyError

P = ParamSpec("P")
T = TypeVar("T")

KEPT_CODECS: Final = 4
"""Models whose tokenizers stay loaded. One of a large vocabulary takes about 100 MB and a second to load."""


class Models:
    """Cards and tokenizers of one marketplace."""

    def __init__(self, marketplace: Marketplace, clock: Clock, entropy: Entropy, limits: Limits) -> None:
        self._marketplace = marketplace
        self._clock = clock
        self._entropy = entropy
        self._limits = limits
        self._codecs: OrderedDict[bytes, asyncio.Future[TextCodec]] = OrderedDict()

    async def find(self, model: str) -> tuple[ModelCard, TextCodec]:
        """Raises: ApiError (404 when nobody offers it); nothing was sent or paid."""
        try:
            card = await self._marketplace.card(model)
        except NoProvider as exc:
            raise errors.model_not_found(model, str(exc)) from exc
        except TallyError as exc:
            raise errors.from_tally(exc) from exc
        try:
            return card, await within(self._clock, self._limits.codec_s, self._codec(card))
        except TallyError as exc:
            raise errors.from_tally(exc) from exc
        except TimeoutError as exc:
            raise self._too_slow(model) from exc

    async def offers(self, model: str) -> list[MarketEntry]:
        """Live offers of the model, cheapest first. Raises: ApiError."""
        try:
            return [entry for entry in await self._marketplace.market() if entry.model == model]
        except TallyError as exc:
            raise errors.from_tally(exc) from exc

    async def work(self, model: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run the model's tokenizer or template in a thread, within the limit. Raises: ApiError."""
        try:
            return await within(self._clock, self._limits.codec_s, asyncio.to_thread(work, *args, **kwargs))
        except TallyError as exc:
            raise errors.from_tally(exc) from exc
        except TimeoutError as exc:
            raise self._too_slow(model) from exc

    def _too_slow(self, model: str) -> errors.ApiError:
        said = f"{model}'s tokenizer or template took longer than {self._limits.codec_s:g} s. Nothing was sent."
        return errors.invalid("model", said, "model_unusable")

    async def _codec(self, card: ModelCard) -> TextCodec:
        found = self._codecs.get(card.profile_id)
        if found is None:
            found = asyncio.ensure_future(asyncio.to_thread(self._load, card))
            self._codecs[card.profile_id] = found
            while len(self._codecs) > KEPT_CODECS:
                self._codecs.popitem(last=False)
        self._codecs.move_to_end(card.profile_id)
        try:
            # Shielded: one reader leaving must not fail the others who wait for the same tokenizer.
            return await asyncio.shield(found)
        except TallyError:
            self._codecs.pop(card.profile_id, None)
            raise

    def _load(self, card: ModelCard) -> TextCodec:
        def now() -> datetime:
            return datetime.fromtimestamp(self._clock.now_ms() / 1000, UTC)

        return TextCodec(card, entropy=self._entropy.token, now=now)
