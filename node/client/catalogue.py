"""What is on offer now, and the tokenizer and template behind each: the market as a client sees it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from node.client.cards import fetch_card
from node.ports import Directory, MarketEntry, ModelCard, NoProvider, Transport, TransportError
from protocol.errors import RemoteProtocolError
from protocol.offers import CheckedOffer
from protocol.units import Address, Digest, Verifiability


class Catalogue:
    """Live offers by model, and cards by profile, each fetched once."""

    def __init__(self, transport: Transport, directory: Directory) -> None:
        self._transport = transport
        self._directory = directory
        self._cards: dict[Digest, ModelCard] = {}

    def market(self) -> list[MarketEntry]:
        """Live, verified offers known now, cheapest completion first."""
        entries = [
            MarketEntry(
                checked.model,
                Address(checked.offer.provider),
                checked.peer_id,
                checked.tariff,
                checked.offer.slots,
                checked.offer.load_bps,
                checked.offer.max_context,
                checked.offer.max_output,
                checked.region,
                checked.offer.expires_at,
                Digest(checked.offer.profile_id),
                Verifiability(checked.offer.verifiability),
                checked.offer.base_bps,
            )
            for checked in self._directory.offers()
        ]
        return sorted(entries, key=lambda entry: (entry.model, entry.tariff.completion_price, entry.provider))

    async def card(self, model: str) -> ModelCard:
        """The card of the profile that serves `model`, with the longest context on offer. Raises: NoProvider."""
        offers = await self.offers(model)
        card = await self._fetched(model, offers)
        # No hash binds the context: it is what each provider offers, not what whoever gave the card says.
        longest = max(o.offer.max_context for o in offers if o.offer.profile_id == card.profile_id)
        return replace(card, max_context=longest)

    async def card_of(self, profile: Digest) -> ModelCard:
        """The card of one profile on offer, where several serve one model's name. Raises: NoProvider."""
        offers = [checked for checked in self._directory.offers() if checked.offer.profile_id == profile]
        if not offers:
            raise NoProvider(f"nobody offers profile 0x{profile.hex()}")
        return await self._fetched(offers[0].model, offers)

    async def _fetched(self, model: str, offers: list[CheckedOffer]) -> ModelCard:
        """A card known, or fetched now, of one of the offers. Raises: NoProvider."""
        reasons = []
        for checked in offers:
            known = self._cards.get(checked.offer.profile_id)
            if known is not None:
                return known
        for checked in offers:
            try:
                card = await fetch_card(self._transport, checked)
            except (TransportError, RemoteProtocolError) as exc:
                reasons.append(f"0x{checked.offer.provider.hex()}: {exc}")
                continue
            self._cards[card.profile_id] = card
            return card
        raise NoProvider(f"nobody who offers {model!r} gave its tokenizer: " + "; ".join(reasons))

    async def offers(self, model: str) -> list[CheckedOffer]:
        """Live offers of `model`, after a fresh look when none is known; what can be checked best comes first, and
        of that the profile most providers serve. Raises: NoProvider.
        """
        offers = [checked for checked in self._directory.offers() if checked.model == model]
        if not offers:
            await self._directory.refresh()
            offers = [checked for checked in self._directory.offers() if checked.model == model]
        if not offers:
            known = sorted({checked.model for checked in self._directory.offers()})
            raise NoProvider(f"no live offer for model {model!r}; offered now: {', '.join(known) or 'nothing'}")
        served = Counter(checked.offer.profile_id for checked in offers)

        def rank(checked: CheckedOffer) -> tuple[int, int, bytes]:
            profile = checked.offer.profile_id
            return -checked.offer.verifiability, -served[profile], profile

        return sorted(offers, key=rank)
