"""Parties that speak the protocol wrongly on purpose: a client over a real provider, a provider under a real client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from incentives.prefixes import Prefixes
from node.client.attempt import Attempt
from node.client.attempt import Tools as ClientTools
from node.ports import JobSpec, ModelCard, Stream
from node.transport.memory import MemoryTransport
from protocol import frames
from protocol.eip712 import digest
from protocol.frames import JOB_PROTOCOL, Accepted, Frame, PromptChunk, Quote, QuoteAsk, Request
from protocol.messages import Accept, JobRequest
from protocol.packing import pack, unpack
from protocol.sampling import derive_seed
from protocol.units import WEI_PER_TALLY, JobId, Wei
from protocol.work import nonce_commitment
from tests.spine.lab import Buyer, Market, Seller, SystemEntropy, run, spec

NONCE = b"n" * 32


class RogueAttempt(Attempt):
    """The client's own attempt, with fields of its request changed before it is signed."""

    changes: dict[str, Any]

    def _make_request(self, *args: Any) -> JobRequest:
        return replace(super()._make_request(*args), **self.changes)


async def rogue(market: Market, seller: Seller, buyer: Buyer, job: JobSpec, **changes: Any) -> RogueAttempt:
    """An attempt with a stream of its own, not yet quoted. The buyer must have a channel and know the seller."""
    card: ModelCard = await buyer.router.card(job.model)
    (offer,) = [o for o in buyer.router._directory.offers() if o.offer.provider == seller.wallet.address]
    stream = await buyer.transport.open(seller.peer, JOB_PROTOCOL, 1.0)
    tools = ClientTools(buyer.accounts, buyer.store, market.clock, SystemEntropy(), 5.0, Prefixes())
    deadline = market.clock.now_ms() + int(job.deadline_s * 1000)
    attempt = RogueAttempt(tools, stream, offer, card, job, Wei(WEI_PER_TALLY), deadline)
    attempt.changes = changes
    await attempt.talk.__aenter__()
    return attempt


async def accepted(market: Market, seller: Seller, buyer: Buyer, tokens: int = 200) -> RogueAttempt:
    """A rogue whose job runs."""
    job = spec(tokens)
    attempt = await rogue(market, seller, buyer, job)
    await attempt.quote(len(job.prompt), job.max_tokens)
    await attempt.agree(job.prompt, job.max_tokens, None)
    return attempt


async def leave(attempt: Attempt) -> None:
    await attempt.talk.stream.reset()
    await attempt.talk.__aexit__(None, None, None)


async def pair(market: Market) -> tuple[Seller, Buyer]:
    """A provider and a client with an open channel."""
    seller, buyer = await market.seller(), await market.buyer()
    await run(buyer, spec(1))
    return seller, buyer


async def still_serves(market: Market, seller: Seller) -> None:
    """A stranger's job works, and nothing of the misbehaviour is left running."""
    other = await market.buyer()
    _, done, _ = await run(other, spec(40))
    assert done.completion_tokens == 40
    async with asyncio.timeout(15):
        while seller.provider.server.running or seller.engine.active:
            await asyncio.sleep(0.005)


# ------------------------------------------------------------------------------------------------------------ provider

Misdeed = Callable[["RogueProvider", Stream], Awaitable[None]]


class RogueProvider:
    """Takes a seller's job protocol over: it goes along with the client up to `stage`, then does `misdeed`."""

    def __init__(self, seller: Seller, stage: str, misdeed: Misdeed) -> None:
        self.seller, self.stage, self.misdeed = seller, stage, misdeed
        self.request: JobRequest | None = None
        self.done = False
        transport = seller.transport
        assert isinstance(transport, MemoryTransport)
        transport.serve(JOB_PROTOCOL, self._handle)

    async def _do(self, stream: Stream) -> None:
        self.done = True
        await self.misdeed(self, stream)

    async def _handle(self, stream: Stream) -> None:
        ask = frames.decode(await stream.receive(5))
        assert isinstance(ask, QuoteAsk)
        if self.stage == "asked":
            return await self._do(stream)
        terms = self.seller.provider.offering.terms()
        await self.send(stream, Quote(nonce_commitment(NONCE), next(iter(terms.tariffs)), 0))
        head = frames.decode(await stream.receive(5))
        assert isinstance(head, Request)
        for _ in range(head.prompt_chunks):
            assert isinstance(frames.decode(await stream.receive(5)), PromptChunk)
        self.request = unpack(JobRequest, head.request)
        if self.stage == "requested":
            return await self._do(stream)
        await self.send(stream, self.accept())
        return await self._do(stream)

    @property
    def job_id(self) -> JobId:
        assert self.request is not None
        domain = self.seller.chain.domain
        return JobId(digest(domain, self.request))

    def accept(self, **changes: Any) -> Accepted:
        """The honest acceptance, with fields changed, signed by the provider's own key."""
        assert self.request is not None
        now = self.seller.provider._clock.now_ms()
        seed = derive_seed(self.job_id, self.request.client_nonce, NONCE)
        accept = replace(Accept(self.job_id, NONCE, seed, now), **changes)
        return Accepted(pack(accept), self.seller.node_key.sign(self.seller.chain.domain, accept))

    async def send(self, stream: Stream, frame: Frame) -> None:
        await stream.send(frames.encode(frame))
