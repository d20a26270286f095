"""The offer directory: `/tally/offers/1` served and pulled, gossip on the model's shard, every offer checked.

The walk of an offer: bytes of a stranger -> `check_envelope` (signatures, hashes, dates) -> the chain (is the node
key registered to that wallet, with stake; is the tariff logged) -> the book, newest sequence per provider. Gossip and
pulls are hints; only what passed all of that is ever shown or used.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import Final, Generic, TypeVar

from node.ports import Chain, Clock, PeerAddress, Stream, Transport, TransportError
from protocol import frames
from protocol.base_price import contradicts
from protocol.errors import RemoteProtocolError, TallyError, UnexpectedFrame
from protocol.frames import OFFERS_PROTOCOL, OfferEnvelope, OffersAsk, OffersEnd
from protocol.offers import CheckedOffer, check_envelope
from protocol.units import ZERO_ADDRESS, Address, Digest, Wei

log = logging.getLogger("tally.discovery")

SHARDS: Final = 256
"""Gossip topics offers are spread over. A node reads only the shards of models it cares about."""

PAGE: Final = 64
"""Offers in one answer. Unit: offers, about 1.2 KiB each."""

MAX_OFFERS: Final = 20_000
"""Offers kept. Unit: offers, about 4 KiB each. Past it the ones that expire first are forgotten."""

MAX_PAGES: Final = -(-MAX_OFFERS // PAGE)
"""Pages taken from one peer at a time. Unit: pages. As many as hold what we would keep."""

PULL_TIMEOUT_S: Final = 10.0
PULL_WHOLE_S: Final = 60.0
"""Longest a pull of all pages of a peer may take. Unit: s. What is missing then is asked for at the next refresh."""

LAST_ADDRESS: Final = Address(b"\xff" * 20)
"""After which no provider comes."""

REFRESH_S: Final = 60.0
"""How often bootstrap peers are asked again. Unit: s. Gossip carries changes; this heals what gossip lost."""

CHAIN_MEMORY_S: Final = 300.0
"""How long a registry answer is believed. Unit: s. A slashed or unstaked provider is dropped at most this late."""

DENIED_S: Final = 10.0
"""How long a registry's no is believed. Unit: s. Short, because who registers now is to be seen soon; long enough that
a forged offer sent again and again costs one look."""

MEMORY_SIZE: Final = 2 * MAX_OFFERS
"""Registry answers remembered, of each kind. Unit: answers, about 200 bytes each. Past it the oldest are forgotten."""

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """What was learned in the last `life_s` seconds, at most `size` things; the oldest are forgotten first."""

    def __init__(self, size: int, life_s: float) -> None:
        self._size, self._life_s = size, life_s
        self._things: dict[K, tuple[V, float]] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._things)

    def put(self, key: K, value: V, now: float) -> None:
        self._things.pop(key, None)
        self._things[key] = value, now + self._life_s
        if len(self._things) > self._size:
            del self._things[next(iter(self._things))]

    def get(self, key: K, now: float) -> V | None:
        """None when it was not learned, or too long ago."""
        value, until = self._things.get(key, (None, 0.0))
        if value is not None and until <= now:
            del self._things[key]
            return None
        return value


def shard_topic(model: str) -> str:
    """Gossip topic of a model's offers."""
    return f"/tally/offers/1/{int.from_bytes(hashlib.sha256(model.encode()).digest()[:4], 'big') % SHARDS}"


class OfferDirectory:
    """Implements the Directory port. `min_stake`: wei below which an offer is ignored."""

    def __init__(
        self, transport: Transport, chain: Chain, clock: Clock, bootstrap: tuple[PeerAddress, ...], min_stake: Wei
    ) -> None:
        self._transport = transport
        self._chain = chain
        self._clock = clock
        self._bootstrap = bootstrap
        self._min_stake = min_stake
        self._book: dict[Address, CheckedOffer] = {}
        self._topics: set[str] = set()
        self._registered: Recent[Address, Address] = Recent(MEMORY_SIZE, CHAIN_MEMORY_S)
        self._logged: Recent[Digest, bool] = Recent(MEMORY_SIZE, CHAIN_MEMORY_S)
        self._denied: Recent[bytes, bool] = Recent(MEMORY_SIZE, DENIED_S)  # node keys and tariff hashes
        self._caught: Recent[Address, bool] = Recent(MEMORY_SIZE, CHAIN_MEMORY_S)  # whose evidence was logged lately
        self._own: Address | None = None

    def start_serving(self) -> None:
        """Answer pulls. Call before the transport starts."""
        self._transport.serve(OFFERS_PROTOCOL, self._answer)

    async def run(self) -> None:
        """Pull for ever, until cancelled."""
        while True:
            await self.refresh()
            await self._clock.sleep(REFRESH_S if self._book else 1.0)

    async def announce(self, envelope: OfferEnvelope) -> None:
        """Publish our own offer and answer with it from now on. Raises: RemoteProtocolError if it is not valid."""
        checked = check_envelope(self._chain.domain, envelope, self._clock.now_ms() // 1000)
        self._own = Address(checked.offer.provider)
        self._book[self._own] = checked
        try:
            await self._listen(checked.model)
            await self._transport.publish(shard_topic(checked.model), frames.encode(envelope))
        except TransportError as exc:
            log.warning("our offer was not gossiped, peers will pull it: %s", exc)
        await asyncio.gather(*(self._show(peer, envelope) for peer in self._bootstrap))

    async def refresh(self) -> None:
        """Pull from every bootstrap peer at once. Never raises: unreachable peers are logged."""
        ends = await asyncio.gather(*(self._pull(peer) for peer in self._bootstrap), return_exceptions=True)
        for peer, end in zip(self._bootstrap, ends, strict=True):
            if end is not None:
                log.error("pulling the offers of %s met a bug", peer.peer_id, exc_info=end)
        self._forget_dead()

    def offers(self) -> list[CheckedOffer]:
        """Offers alive now, by provider address."""
        now = self._clock.now_ms() // 1000
        alive = [o for o in self._book.values() if o.offer.expires_at > now and o.tariff.valid_until > now]
        return sorted(alive, key=lambda checked: checked.offer.provider)

    async def consider(self, envelope: OfferEnvelope) -> bool:
        """Check an offer and take it in if it is newer than what we have. Returns whether it was new.

        Raises: RemoteProtocolError when it is forged or broken, ChainError when the chain cannot be asked.
        """
        checked = check_envelope(self._chain.domain, envelope, self._clock.now_ms() // 1000)
        provider = Address(checked.offer.provider)
        known = self._book.get(provider)
        if provider == self._own or (known is not None and known.offer.sequence >= checked.offer.sequence):
            return False
        # SPEC 6.2: its node key is registered on chain to its wallet with stake
        if await self._wallet_of(checked.node_key) != provider:
            raise RemoteProtocolError("the offer's node key is not registered to its wallet, or the stake is too low")
        if not await self._is_logged(checked):
            raise RemoteProtocolError("the offer's tariff is not in the chain's log")
        if known is not None and contradicts(known.offer, checked.offer, checked.tariff):
            self._keep_evidence(known, checked)
            raise RemoteProtocolError("the offer's base multiplier contradicts the provider's offer before")
        self._book[provider] = checked
        await self._listen(checked.model)
        return True

    def _keep_evidence(self, earlier: CheckedOffer, later: CheckedOffer) -> None:
        """Two signed offers that cannot both be honest: whole, in the log, so that anybody can check them."""
        now, provider = self._clock.monotonic(), Address(earlier.offer.provider)
        if self._caught.get(provider, now):
            return
        self._caught.put(provider, True, now)
        proof = ", ".join(frames.encode(checked.envelope).hex() for checked in (earlier, later))
        log.error("provider 0x%s contradicts its own base price; evidence: %s", provider.hex(), proof)

    async def _wallet_of(self, node_key: Address) -> Address | None:
        now = self._clock.monotonic()
        known = self._registered.get(node_key, now)
        if known is not None or self._denied.get(node_key, now):
            return known
        record = await self._chain.provider_by_node_key(node_key)
        if record is None or record.stake < self._min_stake:
            self._denied.put(node_key, True, now)
            return None
        self._registered.put(node_key, record.wallet, now)
        return record.wallet

    async def _is_logged(self, checked: CheckedOffer) -> bool:
        now = self._clock.monotonic()
        if self._logged.get(checked.tariff_hash, now):
            return True
        if self._denied.get(checked.tariff_hash, now):
            return False
        record = await self._chain.tariff(checked.tariff_hash)
        logged = record is not None and record.provider == checked.tariff.provider
        (self._logged if logged else self._denied).put(checked.tariff_hash, True, now)
        return logged

    async def _listen(self, model: str) -> None:
        topic = shard_topic(model)
        if topic not in self._topics:
            self._topics.add(topic)
            await self._transport.subscribe(topic, self._hear)

    async def _hear(self, author: str, payload: bytes) -> None:
        """A gossiped offer."""
        try:
            frame = frames.decode(payload)
            if isinstance(frame, OfferEnvelope):
                await self.consider(frame)
        except TallyError as exc:
            log.info("gossip of %s ignored: %s", author, exc)

    async def _answer(self, stream: Stream) -> None:
        """One stream of /tally/offers/1: perhaps the peer's own offer, then what it asks for."""
        ask = frames.decode(await stream.receive(PULL_TIMEOUT_S))
        if isinstance(ask, OfferEnvelope):
            # SPEC 6.4: A peer may show its own offer before it asks, and no other's
            if ask.peer_id != stream.peer_id:
                raise RemoteProtocolError("a peer showed another peer's offer as its own")
            await self._consider_quietly(ask)
            ask = frames.decode(await stream.receive(PULL_TIMEOUT_S))
        if not isinstance(ask, OffersAsk):
            raise UnexpectedFrame(type(ask).__name__, "offers")
        rest = [checked for checked in self.offers() if checked.offer.provider > ask.after]
        page = [frames.encode(checked.envelope) for checked in rest[:PAGE]]
        await stream.send(*page, frames.encode(OffersEnd(len(rest) > PAGE)))
        await stream.close()

    async def _show(self, peer: PeerAddress, envelope: OfferEnvelope) -> None:
        """Have a bootstrap peer know our offer, whatever it serves itself. Never raises: who is away sees the next."""
        try:
            async with asyncio.timeout(PULL_TIMEOUT_S):
                stream = await self._transport.open(peer, OFFERS_PROTOCOL, PULL_TIMEOUT_S)
                try:
                    # asked for nothing past the last address: its answer tells that the offer was looked at
                    await stream.send(frames.encode(envelope), frames.encode(OffersAsk(LAST_ADDRESS)))
                    await stream.receive(PULL_TIMEOUT_S)
                finally:
                    await stream.close()
        except (TimeoutError, TallyError) as exc:
            log.info("bootstrap peer %s was not shown our offer: %s", peer.peer_id, exc)

    async def _pull(self, peer: PeerAddress) -> None:
        """Every page of a peer, in bounded time and number; what came before a failure is kept."""
        try:
            async with asyncio.timeout(PULL_WHOLE_S):
                await self._pull_pages(peer)
        except TimeoutError:
            log.info("offers of %s took longer than %g s, the rest is left", peer.peer_id, PULL_WHOLE_S)
        except TallyError as exc:
            log.info("offers of %s could not be pulled: %s", peer.peer_id, exc)

    async def _pull_pages(self, peer: PeerAddress) -> None:
        """Raises: TransportError, RemoteProtocolError, ChainError."""
        after = ZERO_ADDRESS
        for _ in range(MAX_PAGES):
            more, last = await self._pull_page(peer, after)
            if not more:
                return
            if last <= after:
                raise RemoteProtocolError("it has more offers, and shows the same page again")
            after = last
        raise RemoteProtocolError(f"it has more than {MAX_PAGES} pages of offers")

    async def _pull_page(self, peer: PeerAddress, after: Address) -> tuple[bool, Address]:
        """One page; (whether more follow, where they start).

        Raises: TransportError, RemoteProtocolError, ChainError.
        """
        stream = await self._transport.open(peer, OFFERS_PROTOCOL, PULL_TIMEOUT_S)
        try:
            await stream.send(frames.encode(OffersAsk(after)))
            for _ in range(PAGE + 1):
                frame = frames.decode(await stream.receive(PULL_TIMEOUT_S))
                if isinstance(frame, OffersEnd):
                    return frame.more, after
                if not isinstance(frame, OfferEnvelope):
                    raise UnexpectedFrame(type(frame).__name__, "offers")
                after = max(after, await self._consider_quietly(frame))
        finally:
            await stream.close()
        raise RemoteProtocolError(f"more than {PAGE} offers on a page")

    async def _consider_quietly(self, envelope: OfferEnvelope) -> Address:
        try:
            await self.consider(envelope)
        except RemoteProtocolError as exc:
            log.info("an offer was ignored: %s", exc)
        return Address(envelope.offer[:20]) if len(envelope.offer) >= 20 else ZERO_ADDRESS

    def _forget_dead(self) -> None:
        alive = self.offers()
        alive.sort(key=lambda checked: -checked.offer.expires_at)
        self._book = {Address(checked.offer.provider): checked for checked in alive[:MAX_OFFERS]}
