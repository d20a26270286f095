"""Clients that lie, replay, overdraw and babble: typed refusals, one dead stream, all others served, no money moved."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incentives.ledger import Role
from node.ports import StreamEnded
from protocol import frames
from protocol.errors import Refused, RemoteProtocolError
from protocol.frames import (
    JOB_PROTOCOL,
    Abort,
    Ack,
    Cancel,
    End,
    Frame,
    Ping,
    PromptChunk,
    Quote,
    QuoteAsk,
    Receipt,
    RefusalCode,
    Refuse,
    Request,
    VoucherFrame,
)
from protocol.messages import ReceiptAck, Voucher, WorkReceipt
from protocol.options import NO_OPTIONS, encode_options
from protocol.packing import pack, unpack
from protocol.units import INCREMENT_TOKENS, WEI_PER_TALLY, ZERO_DIGEST
from tests.faults.rogues import RogueAttempt, accepted, leave, pair, rogue, still_serves
from tests.spine.lab import Market, Seller, run, spec, wallet
from tests.spine.test_endings import PROMPT_COST, TOKEN

DAY_MS = 24 * 3600 * 1000
FAR = 1 << 61

LIES: list[tuple[dict[str, Any], str]] = [
    ({"profile_id": b"p" * 32}, RefusalCode.UNKNOWN_MODEL),
    ({"tariff_hash": b"t" * 32}, RefusalCode.TARIFF),
    ({"price_ceiling": 5}, RefusalCode.CEILING),
    ({"deadline": 1}, RefusalCode.BAD_REQUEST),
    ({"deadline": FAR}, RefusalCode.BAD_REQUEST),
    ({"max_tokens": 0}, RefusalCode.BAD_REQUEST),
    ({"prompt_tokens": 0}, RefusalCode.BAD_REQUEST),
    ({"max_tokens": 1 << 31}, RefusalCode.CONTEXT_LENGTH),
    ({"max_tokens": 2049}, RefusalCode.BAD_REQUEST),
    ({"tier": 7}, RefusalCode.BAD_REQUEST),
    ({"kind": 9}, RefusalCode.BAD_REQUEST),
    ({"kind": 1}, RefusalCode.BAD_REQUEST),
    ({"kind": 1, "max_tokens": 0}, RefusalCode.BAD_REQUEST),
    ({"kind": 2}, RefusalCode.BAD_REQUEST),
    ({"base_bps": 9_999}, RefusalCode.BAD_REQUEST),
    ({"base_bps": 0}, RefusalCode.BAD_REQUEST),
    ({"reservation": b"r" * 32}, RefusalCode.BAD_REQUEST),
    ({"temperature_micro": 1 << 31}, RefusalCode.BAD_REQUEST),
    ({"top_p_micro": 0}, RefusalCode.BAD_REQUEST),
    ({"parent_job": b"j" * 32}, RefusalCode.BAD_REQUEST),
    ({"parent_seed": b"s" * 32}, RefusalCode.BAD_REQUEST),
    ({"prompt_hash": b"h" * 32}, RefusalCode.BAD_REQUEST),
    ({"prompt_tokens": 5}, RefusalCode.BAD_REQUEST),
    ({"options_hash": b"h" * 32}, RefusalCode.BAD_REQUEST),
    ({"provider": b"x" * 20}, RefusalCode.BAD_REQUEST),
    ({"provider_commitment": b"c" * 32}, RefusalCode.BAD_REQUEST),
    ({"client_box_key": b"\0" * 32}, RefusalCode.BAD_REQUEST),
]


@pytest.mark.parametrize(("lie", "code"), LIES, ids=lambda value: str(value)[:40])
async def test_a_lying_request_is_refused_by_name_and_costs_nothing(lie: dict[str, Any], code: str) -> None:
    async with Market() as market:
        seller, buyer = await pair(market)
        before = buyer.accounts.spent
        attempt = await rogue(market, seller, buyer, spec(100), **lie)
        await attempt.quote(4, 100)
        attempt._reserve = _no_reservation  # type: ignore[method-assign]
        with pytest.raises(Refused) as refusal:
            await attempt.agree((5, 6, 7, 8), 100, None)
        assert refusal.value.code == code
        await leave(attempt)
        assert buyer.accounts.spent == before and len(await seller.store.jobs(Role.PROVIDER)) == 1
        await still_serves(market, seller)


async def _no_reservation(*_: object) -> None:
    return None


async def test_a_forged_request_is_refused() -> None:
    async with Market() as market:
        seller, buyer = await pair(market)
        attempt = await rogue(market, seller, buyer, spec(100))
        await attempt.quote(4, 100)
        head = await _request_of(attempt, seller)
        thief = wallet()
        request = unpack(_job_request(), head.request)
        forged = replace(request, client=buyer.accounts.session.address, client_nonce=b"f" * 32)
        frame = msgspec.structs.replace(head, request=pack(forged), signature=thief.sign(seller.chain.domain, forged))
        await attempt.talk.send(frame)
        refusal = await attempt.talk.receive(5)
        assert isinstance(refusal, Refuse) and refusal.code == RefusalCode.BAD_REQUEST
        assert "signed" in refusal.reason
        await leave(attempt)
        await still_serves(market, seller)


def _job_request() -> type:
    from protocol.messages import JobRequest

    return JobRequest


async def _request_of(attempt: RogueAttempt, seller: Seller) -> Request:
    """The Request frame that `agree` would send; nothing is sent."""
    sent: list[Frame] = []

    async def keep(*outgoing: Frame) -> None:
        sent.extend(outgoing)
        raise StreamEnded("kept")

    send, attempt.talk.send = attempt.talk.send, keep  # type: ignore[method-assign]
    with pytest.raises(StreamEnded):
        await attempt.agree((5, 6, 7, 8), 100, None)
    attempt.talk.send = send  # type: ignore[method-assign]
    assert isinstance(sent[0], Request)
    attempt.kept = sent  # type: ignore[attr-defined]
    return sent[0]


class SameNonce:
    """Entropy that repeats itself, so that a quote can be replayed."""

    def token(self, size: int) -> bytes:
        return b"r" * size


@pytest.mark.parametrize("same_nonce", [True, False])
async def test_a_replayed_request_is_refused(same_nonce: bool) -> None:
    async with Market() as market:
        seller, buyer = await pair(market)
        if same_nonce:
            seller.provider.server._entropy = SameNonce()
        first = await rogue(market, seller, buyer, spec(100))
        await first.quote(4, 100)
        await _request_of(first, seller)
        kept: list[Frame] = first.kept  # type: ignore[attr-defined]
        await first.talk.send(*kept)
        assert isinstance(await first.talk.receive(5), frames.Accepted)
        second = await rogue(market, seller, buyer, spec(100))
        await second.quote(4, 100)
        await second.talk.send(*kept)
        refusal = await second.talk.receive(5)
        assert isinstance(refusal, Refuse)
        assert refusal.code == (RefusalCode.DUPLICATE if same_nonce else RefusalCode.BAD_REQUEST)
        await leave(first)
        await leave(second)
        assert len(await seller.store.jobs(Role.PROVIDER)) == 2
        await still_serves(market, seller)


async def test_more_prompt_than_was_signed_is_not_even_read() -> None:
    """The count of chunks follows from the signed number of tokens; else a stranger has us hold 8 MB a stream."""
    async with Market() as market:
        seller, buyer = await pair(market)
        attempt = await rogue(market, seller, buyer, spec(100))
        await attempt.quote(4, 100)
        head = await _request_of(attempt, seller)
        await attempt.talk.send(msgspec.structs.replace(head, prompt_chunks=128))
        refusal = await attempt.talk.receive(5)
        assert isinstance(refusal, Refuse) and refusal.code == RefusalCode.BAD_REQUEST
        await leave(attempt)
        await still_serves(market, seller)


# ------------------------------------------------------------------------------------------------------------ vouchers


def voucher_frame(attempt: RogueAttempt, seller: Seller, step: int, wei: int, **changes: Any) -> VoucherFrame:
    signer = changes.pop("signer", attempt._tools.accounts.session)
    voucher = replace(Voucher(seller.wallet.address, wei), **changes)
    return VoucherFrame(step, pack(voucher), signer.sign(seller.chain.domain, voucher))


async def first_receipt(attempt: RogueAttempt) -> WorkReceipt:
    while True:
        frame = await attempt.talk.receive(5)
        if isinstance(frame, Receipt):
            return unpack(WorkReceipt, frame.receipt)


@pytest.mark.parametrize(
    ("step", "wei", "changes"),
    [
        (1, WEI_PER_TALLY + 1, {}),
        (1, 0, {}),
        (1, PROMPT_COST + INCREMENT_TOKENS * TOKEN - 1, {}),
        (1, PROMPT_COST + INCREMENT_TOKENS * TOKEN, {}),  # forgets the job before it
        (2, WEI_PER_TALLY // 2, {}),
        (1, WEI_PER_TALLY // 2, {"provider": b"x" * 20}),
        (1, WEI_PER_TALLY // 2, {"signer": wallet()}),
    ],
    ids=["above deposit", "nothing", "a wei less", "not cumulative", "wrong step", "to another", "forged"],
)
async def test_a_bad_voucher_ends_its_job_unpaid_and_no_other(step: int, wei: int, changes: dict[str, Any]) -> None:
    async with Market() as market:
        seller, buyer = await pair(market)
        held = seller.provider.books.channel(buyer.accounts.session.address)
        bystander = await market.buyer()
        honest = asyncio.create_task(run(bystander, spec(300)))
        attempt = await accepted(market, seller, buyer)
        await first_receipt(attempt)
        await attempt.talk.send(voucher_frame(attempt, seller, step, wei, **changes))
        with pytest.raises((StreamEnded, RemoteProtocolError, Refused)):
            while True:
                frame = await attempt.talk.receive(5)
                if isinstance(frame, Abort):
                    raise Refused(frame.code, frame.reason)
        await leave(attempt)
        after = seller.provider.books.channel(buyer.accounts.session.address)
        assert (after.vouched, after.owed) == (held.vouched, held.owed)
        _, done, _ = await honest
        assert done.completion_tokens == 300
        await still_serves(market, seller)
        jobs = await seller.store.jobs(Role.PROVIDER)
        assert all(job.closed is not None for job in jobs)


async def test_a_repeated_voucher_pays_once() -> None:
    async with Market() as market:
        seller, buyer = await pair(market)
        held = seller.provider.books.channel(buyer.accounts.session.address).vouched
        attempt = await accepted(market, seller, buyer)
        receipt = await first_receipt(attempt)
        frame = voucher_frame(attempt, seller, 1, held + receipt.total)
        await attempt.talk.send(frame)
        await attempt.talk.send(frame)
        with pytest.raises((StreamEnded, RemoteProtocolError, Refused)):
            while True:
                heard = await attempt.talk.receive(5)
                if isinstance(heard, Abort):
                    raise Refused(heard.code, heard.reason)
        await leave(attempt)
        assert seller.provider.books.channel(buyer.accounts.session.address).vouched == held + receipt.total
        await still_serves(market, seller)


# -------------------------------------------------------------------------------------------------------------- babble

bytes_of_a_frame = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda tag, rest: msgspec.msgpack.encode([tag, *rest]),
        st.integers(-2, 40),
        st.lists(
            st.one_of(
                st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.binary(max_size=80), st.text(max_size=9)
            ),
            max_size=7,
        ),
    ),
    st.sampled_from(
        [
            frames.encode(frame)
            for frame in (
                QuoteAsk(b"c" * 20, ZERO_DIGEST, 1, 1, 1),
                Quote(ZERO_DIGEST, ZERO_DIGEST, 0),
                Request(b"r", b"s" * 65, ZERO_DIGEST, ZERO_DIGEST, b"", encode_options(NO_OPTIONS), 1),
                Request(b"r", b"s" * 65, ZERO_DIGEST, ZERO_DIGEST, b"x" * 31, b"o", 1),
                PromptChunk(b"p"),
                frames.Accepted(b"a", b"s" * 65),
                Refuse("busy", ""),
                frames.Tokens(b"t"),
                frames.Vectors(b"v"),
                Receipt(b"r", b"s" * 65),
                VoucherFrame(0, b"v", b"s" * 65),
                VoucherFrame(1, pack(Voucher(b"p" * 20, 7)), b"s" * 65),
                End(b"e", b"s" * 65),
                Ack(pack(ReceiptAck(ZERO_DIGEST)), b"s" * 65, b"v", b"s" * 65),
                Cancel(),
                Abort("internal", ""),
                Ping(7),
                frames.Pong(7),
                frames.OffersEnd(False),
            )
        ]
    ),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=False)
@given(state=st.sampled_from(["idle", "asked", "running"]), babble=st.lists(bytes_of_a_frame, min_size=1, max_size=4))
def test_whatever_a_client_says_in_whatever_state_only_its_stream_dies(state: str, babble: list[bytes]) -> None:
    asyncio.run(_babble_at_provider(state, babble))


async def _babble_at_provider(state: str, babble: list[bytes]) -> None:
    async with Market() as market:
        seller, buyer = await pair(market)
        before = seller.provider.books.channel(buyer.accounts.session.address)
        if state == "running":
            attempt = await accepted(market, seller, buyer)
            stream = attempt.talk.stream
        elif state == "asked":
            attempt = await rogue(market, seller, buyer, spec(100))
            await attempt.quote(4, 100)
            stream = attempt.talk.stream
        else:
            stream = await buyer.transport.open(seller.peer, JOB_PROTOCOL, 1.0)
        for said in babble:
            try:
                await stream.send(said)
            except StreamEnded:
                break
        await stream.reset()
        await still_serves(market, seller)
        after = seller.provider.books.channel(buyer.accounts.session.address)
        assert (after.vouched, after.owed, dict(after.reserved)) == (before.vouched, before.owed, {})
        assert all(job.closed is not None for job in await seller.store.jobs(Role.PROVIDER))
        if state != "idle":
            await leave(attempt)
