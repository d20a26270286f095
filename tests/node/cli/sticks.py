"""A whole job as both sides would have signed it, made with the code the nodes run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from protocol.bundle import Bundle, Notch
from protocol.cache import block_heads
from protocol.eip712 import Domain, digest, hash_struct
from protocol.messages import Accept, JobRequest, Profile, ReceiptAck, Tariff, Voucher
from protocol.options import JobOptions, encode_options, options_hash
from protocol.sampling import derive_seed
from protocol.signing import Signer
from protocol.transcript import Row
from protocol.units import LEAF_TOKENS, ZERO_DIGEST, Address, Digest, FinishReason, JobId, JobKind, Wei
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
    margin_milli=100, logprob_micro=10000, projection_micro=20000, flag_ppm=1000,
    active_parameters=10**6, total_parameters=10**6, body_parameters=900_000,
    head_parameters=100_000, layers=4, heads=4, head_dim=16, window=0,
    moe_layers=0, experts=0, experts_chosen=0, reasoning_start=10, reasoning_end=20,
)  # fmt: skip
"""Its reasoning blocks run from token 10 to token 20: a job of more than 20 tokens, which count up, has one of 11."""

EXPERTS = replace(PROFILE, total_parameters=4 * 10**6, moe_layers=4, experts=8, experts_chosen=2)
"""The same as a mixture of experts, whose tokens carry routing evidence."""

TARIFF = Tariff(
    provider=WALLET.address, sequence=7, profile_id=hash_struct(PROFILE),
    prompt_price=100_000_000_007, cached_price=20_000_000_000, completion_price=400_000_000_003,
    reasoning_price=500_000_000_009, per_request=5, embedding_price=30_000_000_001,
    flex_bps=5_000, standard_bps=10_000, priority_bps=20_001,
    flex_ttft_ms=0, standard_ttft_ms=500, priority_ttft_ms=100,
    flex_tpot_ms=0, standard_tpot_ms=100, priority_tpot_ms=50,
    flex_refund_bps=0, standard_refund_bps=1_000, priority_refund_bps=2_000,
    long_context_threshold=1000, long_context_bps=15_000, privacy_bps=12_000, reserved_discount_bps=2_500,
    cache_ttl_s=300, base_min_bps=10_000, base_max_bps=20_000,
    valid_from=NOW_MS // 1000 - 10, valid_until=NOW_MS // 1000 + 1000,
)  # fmt: skip


SALT = b"\x7a" * 32
"""The payer's secret that names its prefix cache."""

PENALISED = JobOptions(stop_ids=(2,), frequency_milli=500)


@dataclass(frozen=True)
class Recipe:
    """What kind of job it was. `salted`: the payer wanted caching. `kept`: the provider holds the prompt at the end.

    `vectors`: how many of an embedding job's texts were delivered. `reserved`: sold under a reservation.
    """

    prompt_tokens: int = 70
    cached_tokens: int = 32
    completion_tokens: int = 70
    max_tokens: int = 100
    tier: int = 1
    private: bool = False
    finish: FinishReason = FinishReason.STOP
    before: int = 1000
    """Wei vouched on the channel before this job."""
    kind: JobKind = JobKind.GENERATE
    base_bps: int = 10_000
    reserved: bool = False
    salted: bool = True
    kept: bool = True
    options: JobOptions = PENALISED
    vectors: int = 0
    profile: Profile = PROFILE


EMBEDDING = Recipe(
    prompt_tokens=57, cached_tokens=0, completion_tokens=0, max_tokens=0, kind=JobKind.EMBED, salted=False, kept=False,
    options=JobOptions(inputs=(20, 30, 7)), vectors=3,
)  # fmt: skip
"""Three texts, all delivered."""


def make_bundle(recipe: Recipe | None = None, domain: Domain = DOMAIN) -> Bundle:
    """One honest job, all signatures there."""
    r = recipe or Recipe()
    nonce, client_nonce = b"\x55" * 32, Digest(b"\x66" * 32)
    tariff = replace(TARIFF, profile_id=hash_struct(r.profile))
    options = encode_options(r.options)
    request = JobRequest(
        provider=WALLET.address, client=SESSION.address, profile_id=tariff.profile_id, kind=r.kind,
        prompt_hash=Digest(b"\x77" * 32), prompt_tokens=r.prompt_tokens, max_tokens=r.max_tokens,
        temperature_micro=700_000, top_p_micro=950_000, top_k=0, options_hash=options_hash(options), tier=r.tier,
        is_private=r.private, tariff_hash=digest(domain, tariff),
        base_bps=10_000 - tariff.reserved_discount_bps if r.reserved else r.base_bps,
        reservation=Digest(b"\x7b" * 32) if r.reserved else ZERO_DIGEST, price_ceiling=10**17,
        client_nonce=client_nonce, provider_commitment=Digest(hashlib.sha256(nonce).digest()),
        client_box_key=Digest(b"\x79" * 32), deadline=NOW_MS + 600_000, parent_job=ZERO_DIGEST,
        parent_seed=ZERO_DIGEST,
    )  # fmt: skip
    job_id = JobId(digest(domain, request))
    accept = Accept(Digest(job_id), Digest(nonce), derive_seed(job_id, client_nonce, nonce), NOW_MS)
    heads = block_heads(SALT, range(r.prompt_tokens)) if r.salted else ()
    work = Work.start(job_id, request, r.options, tariff, r.profile, accept, heads)
    return Bundle(
        domain=domain, node_key=NODE.address, request=request, request_signature=SESSION.sign(domain, request),
        accept=accept, accept_signature=NODE.sign(domain, accept), options=options, profile=r.profile, tariff=tariff,
        tariff_signature=NODE.sign(domain, tariff), notches=_notches(domain, r, work),
    )  # fmt: skip


def _notches(domain: Domain, r: Recipe, work: Work) -> tuple[Notch, ...]:
    work = work.hit(r.cached_tokens, kept=r.kept)
    routing = b"\x07" * 8 if r.profile.moe_layers else b""
    for index in range(r.vectors):
        work = work.take_vector(index, bytes([index]) * 64, NOW_MS + 100)
    notches: list[Notch] = []
    token, vouched = 0, r.before
    while True:
        count = min(LEAF_TOKENS, r.completion_tokens - token)
        ids = tuple(range(token, token + count))
        if ids:
            work = work.take(tuple(Row(i, b"\0\1", bytes(16), routing) for i in ids), NOW_MS + 100)
        token += count
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
