"""Providers that lie and babble: the client's job ends in a typed error or elsewhere, nothing is paid, others go on."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incentives.ledger import Role
from node.ports import JobFailed, NoProvider, Stream
from node.transport.memory import MemoryTransport
from protocol import frames
from protocol.errors import RemoteProtocolError, TallyError
from protocol.frames import OFFERS_PROTOCOL, Abort, Accepted, End, OffersEnd, Receipt, Tokens
from protocol.messages import Offer, Tariff, WorkReceipt
from protocol.offers import seal_offer
from protocol.packing import pack, unpack
from protocol.signing import Signer
from protocol.units import INCREMENT_TOKENS, FinishReason
from protocol.work import CLOCK_SLACK_MS
from tests.faults.rogues import RogueProvider, pair
from tests.faults.test_rogue_client import bytes_of_a_frame
from tests.spine.lab import Market, Seller, run, spec, wallet
from tests.spine.test_endings import PROMPT_COST, TOKEN, settle

FAILURES = (JobFailed, NoProvider, RemoteProtocolError)


def _reached(rogue: RogueProvider) -> None:
    assert rogue.done, f"the client never came as far as {rogue.stage}"


async def _ends_unpaid(market: Market, buyer: Any, seller: Seller) -> TallyError:
    """A job with the rogue ends in a typed error and costs nothing; its provider gets nothing."""
    before = buyer.accounts.spent
    with pytest.raises(TallyError) as failure:
        await run(buyer, spec(100))
    assert buyer.accounts.spent == before
    assert not buyer.accounts.channel(seller.wallet.address).reserved
    assert not await buyer.store.jobs(Role.CLIENT, open_only=True)
    return failure.value


WRONG_ACCEPTS = [
    {"seed": b"s" * 32},
    {"job_id": b"j" * 32},
    {"provider_nonce": b"o" * 32},
    {"accepted_at": 1},
]


@pytest.mark.parametrize("lie", WRONG_ACCEPTS, ids=lambda lie: next(iter(lie)))
async def test_a_wrong_acceptance_is_refused(lie: dict[str, Any]) -> None:
    async def misdeed(self: RogueProvider, stream: Stream) -> None:
        await self.send(stream, self.accept(**lie))
        await stream.receive(5)

    async with Market() as market:
        seller, buyer = await pair(market)
        rogue = RogueProvider(seller, "requested", misdeed)
        await _ends_unpaid(market, buyer, seller)
        _reached(rogue)


async def test_an_acceptance_signed_by_another_key_is_refused() -> None:
    async def misdeed(self: RogueProvider, stream: Stream) -> None:
        honest = self.accept()
        await self.send(stream, Accepted(honest.accept, wallet().sign_digest(self.job_id)))  # type: ignore[arg-type]
        await stream.receive(5)

    async with Market() as market:
        seller, buyer = await pair(market)
        rogue = RogueProvider(seller, "requested", misdeed)
        await _ends_unpaid(market, buyer, seller)
        _reached(rogue)


async def test_an_end_of_file_without_END_is_a_failure() -> None:
    async def misdeed(self: RogueProvider, stream: Stream) -> None:
        await stream.close()

    async with Market() as market:
        seller, buyer = await pair(market)
        rogue = RogueProvider(seller, "running", misdeed)
        assert isinstance(await _ends_unpaid(market, buyer, seller), JobFailed)
        _reached(rogue)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(stage=st.sampled_from(["asked", "requested", "running"]), babble=st.lists(bytes_of_a_frame, max_size=4))
def test_whatever_a_provider_says_in_whatever_state_the_client_pays_nothing(stage: str, babble: list[bytes]) -> None:
    async def misdeed(self: RogueProvider, stream: Stream) -> None:
        for said in babble:
            await stream.send(said)
        await stream.reset()

    async def play() -> None:
        async with Market() as market:
            seller, buyer = await pair(market)
            rogue = RogueProvider(seller, stage, misdeed)
            await _ends_unpaid(market, buyer, seller)
            _reached(rogue)
            honest = await market.seller(completion_price=3 * TOKEN)
            for checked in honest.provider.offering._directory.offers():
                await buyer.router._directory.consider(checked.envelope)  # type: ignore[attr-defined]
            _, done, _ = await run(buyer, spec(40))
            assert done.completion_tokens == 40

    asyncio.run(play())


@pytest.mark.parametrize("frame", [Tokens(b"unsealed"), End(b"e", b"s" * 65), Receipt(b"r", b"s" * 65), Abort("x", "")])
async def test_a_successor_takes_over_from_a_babbler(frame: frames.Frame) -> None:
    async def misdeed(self: RogueProvider, stream: Stream) -> None:
        await self.send(stream, frame)
        await asyncio.sleep(5)

    async with Market() as market:
        seller, buyer = await pair(market)
        other = await market.seller(completion_price=3 * TOKEN)
        for checked in other.provider.offering._directory.offers():
            await buyer.router._directory.consider(checked.envelope)  # type: ignore[attr-defined]
        before = await settle(seller)
        rogue = RogueProvider(seller, "running", misdeed)
        _, done, _ = await run(buyer, spec(40))
        _reached(rogue)
        assert done.completion_tokens == 40 and len(done.job_ids) == 2
        assert await settle(seller) == 0 and before > 0
        assert await settle(other) == done.cost


# ------------------------------------------------------------------------------------------------------------ receipts

NAMES = [item.name for item in fields(WorkReceipt)]
CLOCK = {"received_at", "first_token_at", "finished_at"}


def altered(receipt: WorkReceipt, name: str, amount: int) -> WorkReceipt:
    """The receipt with one field changed, to a value its type can hold. Clocks move further than they may differ."""
    value = getattr(receipt, name)
    if isinstance(value, bool):
        return replace(receipt, **{name: not value})
    if isinstance(value, bytes):
        at = amount % len(value)
        return replace(receipt, **{name: value[:at] + bytes([value[at] ^ 1 << amount % 8]) + value[at + 1 :]})
    if name == "waited_ms":  # believed as far as the client itself let the provider wait, and a second a receipt
        return replace(receipt, waited_ms=value + 60_000 + amount)
    if name in CLOCK:
        return replace(receipt, **{name: value + CLOCK_SLACK_MS * 2 + amount})
    if name in ("kind", "tier"):
        return replace(receipt, **{name: value + 1 + amount % 200})
    if name == "finish_reason":
        return replace(receipt, **{name: 1 + (value + amount) % 6})
    return replace(receipt, **{name: value + amount if amount % 2 or amount > value else value - amount})


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(NAMES), amount=st.integers(1, 2**20), step=st.sampled_from([1, 2]), signed=st.booleans())
def test_a_receipt_with_any_field_altered_pays_nothing_more(name: str, amount: int, step: int, signed: bool) -> None:
    """Altered on its way (`signed` false) or by the provider itself, which signs what it claims."""
    asyncio.run(_altered_receipt(name, amount, step, signed))


async def _altered_receipt(name: str, amount: int, step: int, signed: bool) -> None:
    async with Market() as market:
        seller, buyer = await market.seller(), await market.buyer()
        _corrupt(seller, name, amount, step, signed)
        with pytest.raises(FAILURES):
            await run(buyer, spec(200))
        good = PROMPT_COST + INCREMENT_TOKENS * TOKEN if step == 2 else 0
        assert buyer.accounts.spent == await settle(seller) == good
        (job,) = await buyer.store.jobs(Role.CLIENT)
        assert job.closed is FinishReason.ERROR and job.owed == good
        if signed and name != "step":
            assert await buyer.store.get_value(f"evidence/{job.job_id.hex()}/{step}"), "what it signed is kept"


def _corrupt(seller: Seller, name: str, amount: int, step: int, signed: bool) -> None:
    """From receipt `step` on, what this seller sends has one field altered."""
    from node.provider import delivery

    class Corrupting(delivery.Delivery):
        async def _issue(self, finish: FinishReason) -> tuple[WorkReceipt, bytes]:
            receipt, signature = await super()._issue(finish)
            if receipt.step < step:
                return receipt, signature
            receipt = altered(receipt, name, amount)
            signer = self._tools.signer
            return receipt, signer.sign(self._tools.domain, receipt) if signed else signature

    from node.provider import server

    async def accept_and_deliver(*args: Any) -> None:
        server.Delivery = Corrupting  # type: ignore[misc]
        try:
            await honest(*args)
        finally:
            server.Delivery = delivery.Delivery  # type: ignore[misc]

    honest = seller.provider.server._accept_and_deliver
    seller.provider.server._accept_and_deliver = accept_and_deliver  # type: ignore[method-assign]


# -------------------------------------------------------------------------------------------------------------- offers


def _offered(seller: Seller, signer: Signer, *, tariff: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """The seller's offer with fields changed, signed by `signer`, as a frame."""
    (checked,) = seller.provider.offering._directory.offers()
    domain = seller.chain.domain
    sheet = replace(checked.tariff, **(tariff or {}))
    offer = replace(checked.offer, sequence=checked.offer.sequence + 1, **changes)
    from protocol.eip712 import digest

    offer = replace(offer, tariff_hash=digest(domain, sheet))
    return frames.encode(
        seal_offer(
            domain,
            signer,
            offer,
            sheet,
            signer.sign(domain, sheet),
            peer_id=checked.peer_id,
            addresses=checked.addresses,
            model=checked.model,
            region=checked.region,
        )
    )


BAD_OFFERS = {
    "expired tariff": {"tariff": {"valid_from": 1, "valid_until": 2}},
    "tariff not in force yet": {"tariff": {"valid_from": 1 << 40, "valid_until": 1 << 41}},
    "tariff not logged": {"tariff": {"completion_price": 1}},
    "expired offer": {"expires_at": 1},
}


@pytest.mark.parametrize("name", [*BAD_OFFERS, "forged", "stale"])
async def test_a_bad_offer_never_enters_the_book(name: str) -> None:
    async with Market() as market:
        seller, buyer = await pair(market)
        if name == "stale":
            (checked,) = seller.provider.offering._directory.offers()
            old = replace(checked.offer, sequence=checked.offer.sequence - 1, slots=1)
            said = _offered(seller, seller.node_key)
            envelope = frames.decode(said)
            assert isinstance(envelope, frames.OfferEnvelope)
            signature = seller.node_key.sign(seller.chain.domain, old)
            import msgspec

            said = frames.encode(msgspec.structs.replace(envelope, offer=pack(old), signature=signature))
        else:
            said = _offered(seller, wallet() if name == "forged" else seller.node_key, **BAD_OFFERS.get(name, {}))

        async def answer(stream: Stream) -> None:
            await stream.receive(5)
            await stream.send(said, b"\xc1 no frame at all", frames.encode(OffersEnd(False)))

        assert isinstance(seller.transport, MemoryTransport)
        before = buyer.router._directory.offers()
        seller.transport.serve(OFFERS_PROTOCOL, answer)
        await buyer.router._directory.refresh()
        envelope = frames.decode(said)
        assert isinstance(envelope, frames.OfferEnvelope)
        assert unpack(Offer, envelope.offer) and unpack(Tariff, envelope.tariff)
        assert buyer.router._directory.offers() == before
        _, done, _ = await run(buyer, spec(40))
        assert done.completion_tokens == 40
