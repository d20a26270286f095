"""Admission: may this request be served, under which tariff, and what must escrow cover before the first token?

Every check that needs no waiting, in the order in which failing it is cheapest. Nothing is owed for a refusal.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from node.ports import EngineRequest, Sampling, Urgency
from protocol.eip712 import Domain
from protocol.errors import FieldOutOfRange, Refused, RemoteProtocolError, TierNotOffered
from protocol.frames import CHUNK_BYTES, RefusalCode, Request
from protocol.messages import JobRequest, Profile, Tariff
from protocol.metering import opens_reasoning
from protocol.options import EMBED_INCREMENT_TOKENS, JobOptions, Syntax, decode_options, options_hash
from protocol.packing import unpack
from protocol.sampling import check_sampling, derive_seed
from protocol.signing import verify
from protocol.tariff import basis_of, check_basis
from protocol.transcript import prompt_hash
from protocol.units import INCREMENT_TOKENS, ZERO_DIGEST, Address, Digest, JobId, JobKind, Tier, Wei
from protocol.work import most_up, nonce_commitment

MAX_DEADLINE_AHEAD_MS = 24 * 3600 * 1000
"""A job may not ask to live longer than a day: its channel reservation and slot would be held as long."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What this provider serves now. `tariffs`: those in force, by hash. `hidden_size`: of an embedding, 0 for none.

    `bases`: base multipliers that jobs may still name, because a live offer stated them.
    """

    provider: Address
    profile_id: Digest
    max_context: int
    max_output: int
    vocab_size: int
    hidden_size: int
    profile: Profile
    tariffs: Mapping[Digest, Tariff]
    bases: frozenset[int]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that passed. `first_increment`: wei the prompt and the first increment may cost."""

    job_id: JobId
    request: JobRequest
    options: JobOptions
    cache_salt: bytes
    tariff: Tariff
    seed: Digest
    first_increment: Wei


def check_request(domain: Domain, terms: Terms, frame: Request, nonce: bytes, now_ms: int) -> Admitted:
    """The signed request against our terms, before its prompt is read.

    Raises: Refused with the code the client will see; BadSignature, MalformedFrame for a forged or broken document.
    """
    request = unpack(JobRequest, frame.request)
    job_id = JobId(verify(domain, request, frame.signature, Address(request.client)))
    if request.provider != terms.provider or request.provider_commitment != nonce_commitment(nonce):
        raise RemoteProtocolError("the request is for another provider or another quote")
    if request.profile_id != terms.profile_id:
        raise Refused(RefusalCode.UNKNOWN_MODEL, "this provider does not serve that profile")
    tariff = terms.tariffs.get(request.tariff_hash)
    if tariff is None:
        raise Refused(RefusalCode.TARIFF, "the tariff named is not in force here; ask for the current offer")
    check_tariff_now(tariff, now_ms)
    options = _options(frame, request)
    _check_price(terms, tariff, request)
    _check_sizes(terms, frame, request, options)
    _check_sampling(request, options)
    if not now_ms < request.deadline <= now_ms + MAX_DEADLINE_AHEAD_MS:
        raise Refused(RefusalCode.BAD_REQUEST, f"the deadline must lie within the next day, now is {now_ms}")
    worst = most_up(tariff, request, request.max_tokens)
    if worst > request.price_ceiling:
        raise Refused(RefusalCode.CEILING, f"the job may cost {worst} wei, its ceiling is {request.price_ceiling}")
    first = most_up(tariff, request, INCREMENT_TOKENS)
    return Admitted(job_id, request, options, frame.cache_salt, tariff, _seed(job_id, request, nonce), first)


def check_tariff_now(tariff: Tariff, now_ms: int) -> None:
    """Asked again at the very time that the acceptance states: reading a prompt takes a while, and a receipt under a
    sheet that had ended by then would prove a fault. Raises: Refused."""
    if not tariff.valid_from <= now_ms // 1000 < tariff.valid_until:
        raise Refused(RefusalCode.TARIFF, "the tariff named is not in force here; ask for the current offer")


def _options(frame: Request, request: JobRequest) -> JobOptions:
    if options_hash(frame.options) != request.options_hash:
        raise RemoteProtocolError("the options are not those that were signed")
    if len(frame.cache_salt) not in (0, 32):
        raise RemoteProtocolError(f"a cache salt of {len(frame.cache_salt)} bytes, 32 or none are meant")
    # SPEC 5.7: A private or embedding job is not cached
    if frame.cache_salt and (request.is_private or request.kind == JobKind.EMBED):
        raise RemoteProtocolError("a private or embedding job is not cached, so it names no cache")
    return decode_options(frame.options)


def _check_price(terms: Terms, tariff: Tariff, request: JobRequest) -> None:
    """Fail closed: what the sheet has no price for is not served."""
    try:
        basis = basis_of(request)
        check_basis(tariff, basis)
    except TierNotOffered as exc:
        raise Refused(RefusalCode.TARIFF, str(exc)) from exc
    except FieldOutOfRange as exc:
        raise Refused(RefusalCode.BAD_REQUEST, str(exc)) from exc
    if basis.reservation == ZERO_DIGEST and basis.base_bps not in terms.bases:
        reason = f"the base multiplier {basis.base_bps} is of no live offer; take the current one"
        raise Refused(RefusalCode.TARIFF, reason)


def _check_sizes(terms: Terms, frame: Request, request: JobRequest, options: JobOptions) -> None:
    embeds = request.kind == JobKind.EMBED
    if request.prompt_tokens < 1 or (request.max_tokens < 1) != embeds:
        raise Refused(RefusalCode.BAD_REQUEST, "a job needs a prompt, and output tokens unless it embeds")
    if embeds:
        _check_inputs(terms, request, options)
    elif options.inputs or options.dimensions:
        raise Refused(RefusalCode.BAD_REQUEST, "inputs and dimensions belong to an embedding job")
    if frame.prompt_chunks != max(1, -(-4 * request.prompt_tokens // CHUNK_BYTES)):
        raise RemoteProtocolError(f"{frame.prompt_chunks} chunks cannot be a prompt of {request.prompt_tokens} tokens")
    if not embeds and request.prompt_tokens + request.max_tokens > terms.max_context:
        raise Refused(RefusalCode.CONTEXT_LENGTH, f"prompt and output together may have {terms.max_context} tokens")
    if request.max_tokens > terms.max_output:
        raise Refused(RefusalCode.BAD_REQUEST, f"at most {terms.max_output} output tokens are served")
    if options.min_tokens > options.continued + request.max_tokens:
        reason = f"min_tokens {options.min_tokens} is above what max_tokens {request.max_tokens} allows"
        raise Refused(RefusalCode.BAD_REQUEST, reason)
    if options.continued >= request.prompt_tokens:
        raise Refused(RefusalCode.BAD_REQUEST, "a prompt cannot be all output of the job before it")


def _check_inputs(terms: Terms, request: JobRequest, options: JobOptions) -> None:
    if not terms.hidden_size:
        raise Refused(RefusalCode.BAD_REQUEST, "this provider serves no embeddings")
    if not options.inputs or min(options.inputs) < 1 or sum(options.inputs) != request.prompt_tokens:
        raise Refused(RefusalCode.BAD_REQUEST, "the texts' lengths do not make up the prompt")
    if max(options.inputs) > terms.max_context:
        raise Refused(RefusalCode.CONTEXT_LENGTH, f"a text may have {terms.max_context} tokens")
    # SPEC 4.12: texts of at most 8 192 tokens together, or a single one
    if len(options.inputs) > 1 and request.prompt_tokens > EMBED_INCREMENT_TOKENS:
        reason = f"the texts of one job may have {EMBED_INCREMENT_TOKENS} tokens together; ask in several"
        raise Refused(RefusalCode.BAD_REQUEST, reason)
    if options.dimensions > terms.hidden_size:
        raise Refused(RefusalCode.BAD_REQUEST, f"an embedding has {terms.hidden_size} dimensions")
    if 4 * (options.dimensions or terms.hidden_size) > CHUNK_BYTES:
        raise Refused(
            RefusalCode.BAD_REQUEST, f"a vector travels with up to {CHUNK_BYTES // 4} dimensions; ask for those"
        )
    plain = JobOptions(inputs=options.inputs, dimensions=options.dimensions)
    if options != plain:
        raise Refused(RefusalCode.BAD_REQUEST, "an embedding job has no sampling options")


def _check_sampling(request: JobRequest, options: JobOptions) -> None:
    if (options.syntax in (Syntax.NONE, Syntax.JSON)) == bool(options.grammar):
        raise Refused(RefusalCode.BAD_REQUEST, "a grammar's text and its syntax do not go together")
    try:
        check_sampling(request.temperature_micro, request.top_p_micro, request.top_k)
    except FieldOutOfRange as exc:
        raise Refused(RefusalCode.BAD_REQUEST, str(exc)) from exc


def _seed(job_id: JobId, request: JobRequest, nonce: bytes) -> Digest:
    """The parent's seed for a continuation, else the one neither side could choose."""
    if (request.parent_job == ZERO_DIGEST) != (request.parent_seed == ZERO_DIGEST):
        raise Refused(RefusalCode.BAD_REQUEST, "a continuation names both its parent job and the parent's seed")
    if request.parent_job != ZERO_DIGEST:
        return request.parent_seed
    return derive_seed(job_id, request.client_nonce, nonce)


def check_prompt(terms: Terms, admitted: Admitted, salt: bytes, plaintext: bytes) -> tuple[int, ...]:
    """The unsealed prompt's token ids. Raises: RemoteProtocolError, Refused when they are not what was signed."""
    if len(plaintext) != 4 * admitted.request.prompt_tokens:
        raise RemoteProtocolError(f"the prompt has {len(plaintext) // 4} tokens, not {admitted.request.prompt_tokens}")
    token_ids: tuple[int, ...] = struct.unpack(f">{admitted.request.prompt_tokens}I", plaintext)
    if prompt_hash(salt, token_ids) != admitted.request.prompt_hash:
        raise RemoteProtocolError("the prompt is not the one whose hash was signed")
    if max(token_ids) >= terms.vocab_size:
        raise Refused(RefusalCode.BAD_REQUEST, f"token ids end at {terms.vocab_size - 1}")
    opened = admitted.request.kind != JobKind.EMBED and opens_reasoning(terms.profile, token_ids)
    if admitted.options.reasoning_open != opened:
        raise RemoteProtocolError("the prompt's reasoning block is not as the options say")
    return token_ids


def urgency_of(request: JobRequest) -> Urgency:
    """Batch work last, then by tier."""
    return Urgency.BATCH if request.kind == JobKind.BATCH else _URGENCY[Tier(request.tier)]


_URGENCY: Final = {Tier.FLEX: Urgency.FLEX, Tier.STANDARD: Urgency.STANDARD, Tier.PRIORITY: Urgency.PRIORITY}


def engine_request(admitted: Admitted, token_ids: tuple[int, ...]) -> EngineRequest:
    """What the engine is asked. The prefix cache is salted by payer and secret: nobody can time another's prompts."""
    request, salt = admitted.request, admitted.cache_salt
    return EngineRequest(
        prompt=token_ids,
        seed=admitted.seed,
        max_tokens=request.max_tokens,
        sampling=Sampling(request.temperature_micro, request.top_p_micro, request.top_k),
        options=admitted.options,
        urgency=urgency_of(request),
        salt=hashlib.sha256(request.client + salt).digest() if salt else b"",
        hold_s=admitted.tariff.cache_ttl_s,
    )
