"""The offer directory against peers and a chain that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from node.discovery import directory as module
from node.discovery.directory import DENIED_S, PAGE, OfferDirectory, Recent
from node.ports import ChainError, PeerAddress, ProviderRecord, Stream, StreamEnded, TariffRecord
from node.transport.memory import MemoryTransport
from protocol import frames
from protocol.errors import RemoteProtocolError
from protocol.frames import OFFERS_PROTOCOL, OfferEnvelope, OffersAsk, OffersEnd
from protocol.units import WEI_PER_TALLY, Address, Digest, Wei
from tests.spine.lab import Market, Seller, wallet
from tests.twins.memory_chain import MemoryChain


def envelope_of(seller: Seller) -> OfferEnvelope:
    (checked,) = seller.provider.offering._directory.offers()
    return checked.envelope


async def hostile_peer(market: Market, handler: Callable[[Stream], Awaitable[None]]) -> PeerAddress:
    transport = MemoryTransport(market.network, wallet().secret)
    transport.serve(OFFERS_PROTOCOL, handler)
    await transport.start()
    market.stack.push_async_callback(transport.stop)
    return PeerAddress(transport.peer_id, transport.addresses)


async def reader(market: Market, *bootstrap: PeerAddress, min_stake: int = 1) -> tuple[OfferDirectory, MemoryChain]:
    transport = MemoryTransport(market.network, wallet().secret)
    await transport.start()
    market.stack.push_async_callback(transport.stop)
    chain = MemoryChain(market.world)
    return OfferDirectory(transport, chain, market.clock, bootstrap, Wei(min_stake)), chain


class Answers:
    """A peer that answers each ask with `page` and says that there is more."""

    def __init__(self, *page: OfferEnvelope) -> None:
        self.page = page
        self.asked: list[bytes] = []

    async def __call__(self, stream: Stream) -> None:
        ask = frames.decode(await stream.receive(5.0))
        assert isinstance(ask, OffersAsk)
        self.asked.append(bytes(ask.after))
        await stream.send(*map(frames.encode, self.page), frames.encode(OffersEnd(True)))
        await stream.close()


class Lookups:
    """Counts what the chain is asked; `record`, `tariff`: what it answers instead of the truth."""

    def __init__(self, chain: MemoryChain, monkeypatch: pytest.MonkeyPatch) -> None:
        self.records = self.tariffs = 0
        self.failure: Exception | None = None
        self.logged = True
        provider_by_node_key, tariff = chain.provider_by_node_key, chain.tariff

        async def count_record(node_key: Address) -> ProviderRecord | None:
            self.records += 1
            if self.failure is not None:
                raise self.failure
            return await provider_by_node_key(node_key)

        async def count_tariff(tariff_hash: Digest) -> TariffRecord | None:
            self.tariffs += 1
            return await tariff(tariff_hash) if self.logged else None

        monkeypatch.setattr(chain, "provider_by_node_key", count_record)
        monkeypatch.setattr(chain, "tariff", count_tariff)


async def test_a_peer_that_always_has_more_of_the_same_is_left_after_two_pages() -> None:
    async with Market() as market:
        seller = await market.seller()
        answers = Answers(envelope_of(seller))
        book, _ = await reader(market, await hostile_peer(market, answers))
        async with asyncio.timeout(5):
            await book.refresh()
        assert len(answers.asked) == 2
        assert [offer.offer.provider for offer in book.offers()] == [seller.wallet.address]


async def test_a_peer_with_ever_more_pages_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as market:
        envelope = envelope_of(await market.seller())

        class Endless(Answers):
            async def __call__(self, stream: Stream) -> None:
                name = (len(self.asked) + 1).to_bytes(20, "big")
                forged = OfferEnvelope(
                    name + envelope.offer[20:], *(getattr(envelope, field) for field in envelope.__struct_fields__[1:])
                )
                self.page = (forged,)
                await super().__call__(stream)

        monkeypatch.setattr(module, "MAX_PAGES", 7)
        answers = Endless()
        book, _ = await reader(market, await hostile_peer(market, answers))
        async with asyncio.timeout(5):
            await book.refresh()
        assert len(answers.asked) == 7 and answers.asked == sorted(set(answers.asked))
        assert book.offers() == []


async def test_a_peer_that_takes_its_time_does_not_hold_up_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(stream: Stream) -> None:
        await asyncio.sleep(30)

    monkeypatch.setattr(module, "PULL_WHOLE_S", 0.2)
    async with Market() as market:
        seller = await market.seller()
        book, _ = await reader(market, await hostile_peer(market, silent), seller.peer)
        async with asyncio.timeout(5):
            await book.refresh()
        assert len(book.offers()) == 1


@pytest.mark.parametrize("failure", [ChainError("HTTP 403"), RuntimeError("a bug")])
async def test_a_refresh_never_raises(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with Market() as market:
        seller = await market.seller()
        book, chain = await reader(market, seller.peer)
        lookups = Lookups(chain, monkeypatch)
        lookups.failure = failure
        await book.refresh()
        assert book.offers() == []
        assert str(failure) in caplog.text or isinstance(failure, ChainError)
        lookups.failure = None
        await book.refresh()
        assert len(book.offers()) == 1


async def test_an_offer_too_short_to_name_its_provider_ends_nothing() -> None:
    async with Market() as market:
        envelope = envelope_of(await market.seller())
        fields = [getattr(envelope, field) for field in envelope.__struct_fields__[1:]]
        answers = Answers(OfferEnvelope(b"\xff" * 3, *fields))
        book, _ = await reader(market, await hostile_peer(market, answers))
        await book.refresh()
        assert book.offers() == []


async def test_a_refused_node_key_is_not_looked_up_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as market:
        seller = await market.seller()
        envelope = envelope_of(seller)
        book, chain = await reader(market, min_stake=101 * WEI_PER_TALLY)
        lookups = Lookups(chain, monkeypatch)
        for _ in range(5):
            with pytest.raises(RemoteProtocolError, match="stake"):
                await book.consider(envelope)
        assert lookups.records == 1
        await seller.chain.register_provider(seller.node_key.secret, Wei(101 * WEI_PER_TALLY))
        market.clock.ahead_s += DENIED_S + 1
        assert await book.consider(envelope)


async def test_a_tariff_that_is_not_logged_is_not_looked_up_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Market() as market:
        envelope = envelope_of(await market.seller())
        book, chain = await reader(market)
        lookups = Lookups(chain, monkeypatch)
        lookups.logged = False
        for _ in range(5):
            with pytest.raises(RemoteProtocolError, match="tariff"):
                await book.consider(envelope)
        assert (lookups.records, lookups.tariffs) == (1, 1)
        lookups.logged = True
        market.clock.ahead_s += DENIED_S + 1
        assert await book.consider(envelope)


def test_what_is_remembered_is_bounded_and_grows_old() -> None:
    recent: Recent[int, str] = Recent(3, 10.0)
    for number in range(5):
        recent.put(number, "known", 100.0)
    assert [recent.get(number, 105.0) for number in range(5)] == [None, None, "known", "known", "known"]
    recent.put(2, "again", 108.0)  # the youngest now
    recent.put(5, "known", 108.0)
    assert [recent.get(number, 109.0) for number in (2, 3, 4, 5)] == ["again", None, "known", "known"]
    assert recent.get(4, 110.0) is None and recent.get(2, 117.9) == "again"
    assert len(recent) == 2


async def test_honest_pages_are_followed_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 1)
    async with Market() as market:
        sellers = [await market.seller() for _ in range(3)]
        between, _ = await reader(market, *(seller.peer for seller in sellers))
        await between.refresh()
        between.start_serving()
        transport = between._transport
        book, _ = await reader(market, PeerAddress(transport.peer_id, transport.addresses))
        await book.refresh()
        assert len(book.offers()) == len(between.offers()) == 3
    assert PAGE > 1


async def test_a_provider_of_another_model_is_found_through_its_bootstrap_peer() -> None:
    """Nobody there listens to its topic: it shows its offer itself."""
    async with Market() as market:
        known = await market.seller()
        stranger = await market.seller(model="another-model", bootstrap=(known.peer,))
        directory, _ = await reader(market, known.peer)
        await directory.refresh()
        assert {checked.model for checked in directory.offers()} == {"twin-model", "another-model"}
        assert stranger.wallet.address in {checked.offer.provider for checked in directory.offers()}


async def test_a_provider_whose_bootstrap_peer_is_away_serves_all_the_same() -> None:
    async with Market() as market:
        away = PeerAddress(wallet().address.hex(), ("nowhere",))
        seller = await market.seller(bootstrap=(away,))
        assert envelope_of(seller).model == "twin-model"


async def test_nobody_shows_another_peers_offer_as_its_own() -> None:
    async with Market() as market:
        known, victim = await market.seller(), await market.seller(model="another-model")
        transport = MemoryTransport(market.network, wallet().secret)
        await transport.start()
        market.stack.push_async_callback(transport.stop)
        stream = await transport.open(known.peer, OFFERS_PROTOCOL, 1.0)
        await stream.send(frames.encode(envelope_of(victim)), frames.encode(OffersAsk(bytes(20))))
        with pytest.raises(StreamEnded):
            await stream.receive(5.0)
        directory, _ = await reader(market, known.peer)
        await directory.refresh()
        assert {checked.model for checked in directory.offers()} == {"twin-model"}
