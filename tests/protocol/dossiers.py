"""Dossiers of finished jobs, made with real signatures: honest ones, to be bent by tests."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Final

from protocol.dossier import Dossier
from protocol.eip712 import Domain, digest, hash_struct
from protocol.merkle import Entry
from protocol.messages import Accept, JobRequest, Profile, Tariff, WorkReceipt
from protocol.options import NO_OPTIONS, JobOptions, encode_options, options_hash
from protocol.sampling import derive_seed
from protocol.signing import Signer
from protocol.transcript import Leaf, Row, prompt_hash
from protocol.units import LEAF_TOKENS, Digest, FinishReason, JobId, JobKind, Wei
from protocol.work import Work, nonce_commitment
from tests.protocol.jobs import DOMAIN, REQUEST, START
from tests.protocol.sheets import PROFILE, SHEET

NODE: Final = Signer.from_secret(b"\x31" * 32)
SESSION: Final = Signer.from_secret(b"\x32" * 32)
SALT: Final = b"\x33" * 32
NONCE: Final = b"\x34" * 32


@dataclass(frozen=True)
class Case:
    """A dossier, the entry it belongs to, the profile it is examined under, and every receipt of the job."""

    dossier: Dossier
    entry: Entry
    profile: Profile
    receipts: tuple[WorkReceipt, ...] = ()


def row(index: int, *, routed: bool = False) -> Row:
    """The token at an output index."""
    return Row(100 + index, b"\x3c\x00", bytes([index % 256]) * 16, bytes([index % 256]) * 8 if routed else b"")


def served(
    tokens: int = 70,
    *,
    max_tokens: int = 100,
    finish: FinishReason = FinishReason.STOP,
    prompt: tuple[int, ...] = (5, 6, 7, 8),
    options: JobOptions = NO_OPTIONS,
    profile: Profile = PROFILE,
    vectors: int = 0,
    open_ended: bool = False,
    node_key: Signer = NODE,
    domain: Domain = DOMAIN,
    start: int = START,
    nonce: int = 0,
    **request: Any,
) -> Case:
    """A job as its provider would show it. `vectors`: of an embedding job. `open_ended`: without a final receipt."""
    tariff = _sheet(profile, request.get("provider", REQUEST.provider), start)
    request = {"deadline": start + 600_000, **request}
    asked = _request(domain, tariff, profile, prompt, max_tokens, options, nonce, **request)
    job_id = JobId(digest(domain, asked))
    seed = derive_seed(job_id, asked.client_nonce, NONCE)
    if any(asked.parent_job):
        seed = Digest(asked.parent_seed)
    accept = Accept(Digest(job_id), Digest(NONCE), seed, start)
    receipts: list[WorkReceipt] = []
    work = Work.start(job_id, asked, options, tariff, profile, accept, ())
    content: list[bytes] = []
    for index in range(vectors):
        vector = bytes([index + 1]) * 16
        content.append(vector)
        work = work.take_vector(index, vector, start + 50)
    for index in range(tokens):
        work = work.take((row(index, routed=bool(profile.moe_layers)),), start + 50)
        last = index == tokens - 1
        if len(work.pending) == LEAF_TOKENS and (not last or open_ended):
            content.append(Leaf.of(work.pending).to_bytes())
            work, receipt = work.receipt(FinishReason.OPEN, 0, Wei(0))
            receipts.append(receipt)
            work = work.sealed(digest(domain, receipt))
    if not open_ended:
        if work.pending:
            content.append(Leaf.of(work.pending).to_bytes())
        work, receipt = work.receipt(finish, start + 900, Wei(0))
        receipts.append(receipt)
    private = bool(asked.is_private)
    dossier = Dossier(
        asked,
        SESSION.sign(domain, asked),
        accept,
        node_key.sign(domain, accept),
        encode_options(options),
        tariff,
        node_key.sign(domain, tariff),
        receipt,
        node_key.sign(domain, receipt),
        b"" if private else SALT,
        () if private else prompt,
        () if private else tuple(content),
    )
    entry = Entry(job_id, Digest(digest(domain, receipt)), Wei(receipt.total))
    return Case(dossier, entry, profile, tuple(receipts))


def _sheet(profile: Profile, provider: bytes, start: int) -> Tariff:
    return replace(
        SHEET, provider=provider, profile_id=hash_struct(profile), valid_from=0, valid_until=start // 1000 + 99
    )


def _request(
    domain: Domain,
    tariff: Tariff,
    profile: Profile,
    prompt: tuple[int, ...],
    max_tokens: int,
    options: JobOptions,
    nonce: int,
    **changes: Any,
) -> JobRequest:
    embeds = changes.get("kind") == JobKind.EMBED
    return replace(
        REQUEST,
        client=SESSION.address,
        profile_id=hash_struct(profile),
        prompt_hash=prompt_hash(SALT, prompt),
        prompt_tokens=len(prompt),
        max_tokens=0 if embeds else max_tokens,
        options_hash=options_hash(encode_options(options)),
        tariff_hash=digest(domain, tariff),
        provider_commitment=nonce_commitment(NONCE),
        client_nonce=Digest(hashlib.sha256(b"nonce %d" % nonce).digest()),
        **changes,
    )


def signed(case: Case, **changes: Any) -> Case:
    """With another receipt that its node key signed all the same, and the entry that a liar would commit to."""
    receipt = replace(case.dossier.receipt, **changes)
    dossier = replace(case.dossier, receipt=receipt, receipt_signature=NODE.sign(DOMAIN, receipt))
    return Case(dossier, Entry(case.entry.job_id, Digest(digest(DOMAIN, receipt)), Wei(receipt.total)), case.profile)
