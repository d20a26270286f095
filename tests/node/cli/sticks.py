"""A whole job as both sides would have signed it, made with the code the nodes run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from protocol.bundle import Bundle, Notch
from protocol.eip712 import Domain, digest
from protocol.messages import Accept, JobRequest, Profile, ReceiptAck, Tariff, Voucher
from protocol.sampling import derive_seed
from protocol.signing import Signer
from protocol.units import LEAF_TOKENS, ZERO_DIGEST, Address, Digest, FinishReason, JobId, Wei
from protocol.work import Work

DOMAIN = Domain(31337, Address(b"\xe5" * 20))
WALLET = Signer.from_secret(b"\x11" * 32)
NODE = Signer.from_secret(b"\x22" * 32)
SESSION = Signer.from_secret(b"\x33" * 32)
NOW_MS = 1_700_000_000_000

PROFILE = Profile(
    **{name: Digest(bytes([index]) * 32) for index, name in enumerate(
        ("weights_root", "tokenizer_hash", "chat_template_hash", "special_policy_hash", "dtype_hash", "kv_dtype_hash",
         "engine_hash", "sampler_hash"), start=1)},
    margin_milli=100, flag_ppm=1000, active_parameters=10**6, total_parameters=10**6, body_parameters=900_000,
    head_parameters=100_000, layers=4, heads=4, head_dim=16, window=0,
)  # fmt: skip

TARIFF = Tariff(
    provider=WALLET.address, sequence=7, profile_id=digest(DOMAIN, PROFILE),
    prompt_price=100_000_000_007, cached_price=20_000_000_000, completion_price=400_000_000_003,
    reasoning_price=400_000_000_003, per_request=5,
    flex_bps=5_000, standard_bps=10_000, priority_bps=20_001,
    flex_ttft_ms=0, standard_ttft_ms=500, priority_ttft_ms=100,
    flex_tpot_ms=0, standard_tpot_ms=100, priority_tpot_ms=50,
    flex_refund_bps=0, standard_refund_bps=1_000, priority_refund_bps=2_000,
    long_context_threshold=1000, long_context_bps=15_000, privacy_bps=12_000, reserved_discount_bps=0,
    valid_from=NOW_MS // 1000 - 10, valid_until=NOW_MS // 1000 + 1000,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What kind of job it was."""

    prompt_tokens: int = 17
    cached_tokens: int = 5
    completion_tokens: int = 70
    max_tokens: int = 100
    tier: int = 1
    private: bool = False
    finish: FinishReason = FinishReason.STOP
    before: int = 1000
    """Wei vouched on the channel before this job."""


def make_bundle(recipe: Recipe | None = None, domain: Domain = DOMAIN) -> Bundle:
    """One honest job, all signatures there."""
    r = recipe or Recipe()
    nonce, client_nonce = b"\x55" * 32, Digest(b"\x66" * 32)
    request = JobRequest(
        provider=WALLET.address, client=SESSION.address, profile_id=TARIFF.profile_id,
        prompt_hash=Digest(b"\x77" * 32), prompt_tokens=r.prompt_tokens, max_tokens=r.max_tokens,
        temperature_micro=700_000, top_p_micro=950_000, top_k=0, stop_hash=Digest(b"\x78" * 32), tier=r.tier,
        is_private=r.private, tariff_hash=digest(domain, TARIFF), price_ceiling=10**17, client_nonce=client_nonce,
        provider_commitment=Digest(hashlib.sha256(nonce).digest()), client_box_key=Digest(b"\x79" * 32),
        deadline=NOW_MS + 600_000, parent_job=ZERO_DIGEST, parent_seed=ZERO_DIGEST,
    )  # fmt: skip
    job_id = JobId(digest(domain, request))
    accept = Accept(Digest(job_id), Digest(nonce), derive_seed(job_id, client_nonce, nonce), NOW_MS)
    return Bundle(
        domain, NODE.address, request, SESSION.sign(domain, request), accept, NODE.sign(domain, accept),
        TARIFF, NODE.sign(domain, TARIFF), _notches(domain, r, job_id, request, accept),
    )  # fmt: skip


def _notches(domain: Domain, r: Recipe, job_id: JobId, request: JobRequest, accept: Accept) -> tuple[Notch, ...]:
    work = Work.start(job_id, request, TARIFF, PROFILE, accept)
    notches: list[Notch] = []
    token, vouched = 0, r.before
    while True:
        count = min(LEAF_TOKENS, r.completion_tokens - token)
        ids = tuple(range(token, token + count))
        if ids:
            work = work.take(tuple((i, b"\0\1", bytes(16)) for i in ids), NOW_MS + 100)
        token += count
        if work.step == 0:
            work = replace(work, cached_tokens=r.cached_tokens)
        final = token == r.completion_tokens
        finish = r.finish if final else FinishReason.OPEN
        work, receipt = work.receipt(finish, NOW_MS + 5_000 if final else 0, Wei(vouched))
        found = digest(domain, receipt)
        work = work.sealed(found)
        vouched = max(vouched, r.before + receipt.total)  # a refund at the end lowers the total, never the voucher
        voucher = Voucher(WALLET.address, vouched)
        ack = SESSION.sign(domain, ReceiptAck(found)) if final else b""
        notches.append(
            Notch(found, receipt, NODE.sign(domain, receipt), voucher, SESSION.sign(domain, voucher), ack, ids)
        )
        if final:
            return tuple(notches)
