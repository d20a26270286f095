"""Whole jobs as a provider and its payers would have signed them, to be audited."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from protocol.bundle import Bundle, Notch
from protocol.cache import block_heads
from protocol.eip712 import digest, hash_struct
from protocol.messages import Accept, ReceiptAck, Tariff, Voucher, WorkReceipt
from protocol.options import NO_OPTIONS, encode_options
from protocol.sampling import derive_seed
from protocol.signing import Signer
from protocol.transcript import Row
from protocol.units import Address, Digest, FinishReason, Wei
from protocol.work import Work, check_receipt, nonce_commitment
from tests.protocol.jobs import DOMAIN, REQUEST, SALT, START
from tests.protocol.sheets import PROFILE, SHEET

NODE = Signer.from_secret(b"\x41" * 32)
WALLET = Signer.from_secret(b"\x43" * 32)
PAYERS = tuple(Signer.from_secret(bytes([0x50 + number]) * 32) for number in range(4))

TARIFF = replace(SHEET, provider=WALLET.address, profile_id=hash_struct(PROFILE), valid_from=0, valid_until=1 << 40)


def sell(
    *,
    payer: Signer = PAYERS[0],
    tariff: Tariff = TARIFF,
    at: int = START,
    ttft_ms: int = 200,
    tpot_ms: int = 10,
    tokens: int = 40,
    prompt: int = 100,
    cached: int = 0,
    kept: bool = False,
    before: int = 0,
    tier: int = 1,
    nonce: int = 0,
) -> Bundle:
    """One honest job, all signatures there, both sides' accounts run. `before`: wei vouched on the channel earlier."""
    provider_nonce = Digest(hashlib.sha256(b"nonce %d" % nonce).digest())
    request = replace(
        REQUEST, provider=tariff.provider, client=payer.address, profile_id=tariff.profile_id, tier=tier,
        prompt_tokens=prompt, max_tokens=max(1, tokens), tariff_hash=digest(DOMAIN, tariff), deadline=at + 10_000_000,
        client_nonce=Digest(hashlib.sha256(b"client %d" % nonce).digest()),
        provider_commitment=nonce_commitment(provider_nonce),
    )  # fmt: skip
    job_id = digest(DOMAIN, request)
    accept = Accept(job_id, provider_nonce, derive_seed(job_id, request.client_nonce, provider_nonce), at)
    start = Work.start(job_id, request, NO_OPTIONS, tariff, PROFILE, accept, block_heads(SALT, range(prompt)))
    client, provider = replace(start, accepted_seen=at), start.hit(cached, kept=kept)
    notches: list[Notch] = []
    now, done, vouched = at + ttft_ms, 0, before
    while True:
        count = min(32, tokens - done)
        rows = tuple(Row(number, b"\0\1", bytes(16)) for number in range(done, done + count))
        provider, client = provider.take(rows, now), client.take(rows, now)
        done += count
        now += tpot_ms * (count - 1 if done == count else count)
        final = done == tokens
        finish = FinishReason.LENGTH if final else FinishReason.OPEN
        provider, receipt = provider.receipt(finish, now if final else 0, Wei(vouched))
        client, found = check_receipt(DOMAIN, client, receipt, now)
        provider = provider.sealed(found)
        vouched = max(vouched, before + receipt.total)
        notches.append(_notch(payer, receipt, found, vouched, tuple(row.token_id for row in rows)))
        if final:
            break
    return Bundle(
        DOMAIN, NODE.address, request, payer.sign(DOMAIN, request), accept, NODE.sign(DOMAIN, accept),
        encode_options(NO_OPTIONS), PROFILE, tariff, NODE.sign(DOMAIN, tariff), tuple(notches),
    )  # fmt: skip


def _notch(payer: Signer, receipt: WorkReceipt, found: Digest, vouched: int, ids: tuple[int, ...]) -> Notch:
    voucher = Voucher(Address(receipt.provider), vouched)
    ack = payer.sign(DOMAIN, ReceiptAck(found)) if receipt.is_final else b""
    return Notch(found, receipt, NODE.sign(DOMAIN, receipt), voucher, payer.sign(DOMAIN, voucher), ack, ids)


def last(bundle: Bundle) -> WorkReceipt:
    return bundle.notches[-1].receipt


def altered(bundle: Bundle, signer: Signer = NODE, **changes: Any) -> Bundle:
    """With its last receipt changed and signed again."""
    notch = bundle.notches[-1]
    receipt = replace(notch.receipt, **changes)
    made = replace(
        notch, receipt=receipt, digest=digest(DOMAIN, receipt), receipt_signature=signer.sign(DOMAIN, receipt)
    )
    return replace(bundle, notches=(*bundle.notches[:-1], made))


def channel(count: int, payer: Signer = PAYERS[0], **job: Any) -> list[Bundle]:
    """Jobs of one channel in order, each vouched for on top of the one before."""
    out: list[Bundle] = []
    for number in range(count):
        before = out[-1].notches[-1].voucher.cumulative if out and out[-1].notches[-1].voucher else 0
        out.append(sell(payer=payer, before=before, nonce=number, at=START + number * 20_000, **job))
    return out
