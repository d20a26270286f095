"""Admission: may this request be served, under which tariff, and what must escrow cover before the first token?

Every check that needs no waiting, in the order in which failing it is cheapest. Nothing is owed for a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from node.ports import EngineRequest, Sampling
from protocol.eip712 import Domain
from protocol.errors import FieldOutOfRange, Refused, RemoteProtocolError
from protocol.frames import CHUNK_BYTES, RefusalCode, Request
from protocol.messages import JobRequest, Tariff
from protocol.packing import unpack
from protocol.sampling import check_sampling, derive_seed
from protocol.signing import verify
from protocol.transcript import prompt_hash, stop_hash
from protocol.units import INCREMENT_TOKENS, ZERO_DIGEST, Address, Digest, JobId, Tier, Wei
from protocol.work import most_up, nonce_commitment

MAX_DEADLINE_AHEAD_MS = 24 * 3600 * 1000
"""A job may not ask to live longer than a day: its channel reservation and slot would be held as long."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What this provider serves now. `tariffs`: those in force, by hash."""

    provider: Address
    profile_id: Digest
    max_context: int
    max_output: int
    vocab_size: int
    tariffs: Mapping[Digest, Tariff]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that passed. `first_increment`: wei the prompt and the first increment may cost."""

    job_id: JobId
    request: JobRequest
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
    if tariff is None or not tariff.valid_from <= now_ms // 1000 < tariff.valid_until:
        raise Refused(RefusalCode.TARIFF, "the tariff named is not in force here; ask for the current offer")
    _check_sizes(terms, frame, request)
    if not now_ms < request.deadline <= now_ms + MAX_DEADLINE_AHEAD_MS:
        raise Refused(RefusalCode.BAD_REQUEST, f"the deadline must lie within the next day, now is {now_ms}")
    worst = most_up(tariff, request, request.max_tokens)
    if worst > request.price_ceiling:
        raise Refused(RefusalCode.CEILING, f"the job may cost {worst} wei, its ceiling is {request.price_ceiling}")
    first = most_up(tariff, request, INCREMENT_TOKENS)
    return Admitted(job_id, request, tariff, _seed(job_id, request, nonce), first)


def _check_sizes(terms: Terms, frame: Request, request: JobRequest) -> None:
    if request.prompt_tokens < 1 or request.max_tokens < 1:
        raise Refused(RefusalCode.BAD_REQUEST, "a job needs at least one prompt token and one output token")
    if frame.prompt_chunks != max(1, -(-4 * request.prompt_tokens // CHUNK_BYTES)):
        raise RemoteProtocolError(f"{frame.prompt_chunks} chunks cannot be a prompt of {request.prompt_tokens} tokens")
    if request.prompt_tokens + request.max_tokens > terms.max_context:
        raise Refused(RefusalCode.CONTEXT_LENGTH, f"prompt and output together may have {terms.max_context} tokens")
    if request.max_tokens > terms.max_output:
        raise Refused(RefusalCode.BAD_REQUEST, f"at most {terms.max_output} output tokens are served")
    if request.tier not in (Tier.FLEX, Tier.STANDARD, Tier.PRIORITY):
        raise Refused(RefusalCode.BAD_REQUEST, f"there is no latency tier {request.tier}")
    if stop_hash(frame.stop_ids, ()) != request.stop_hash:
        raise RemoteProtocolError("the stop ids are not those that were signed")
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
    token_ids = tuple(int.from_bytes(plaintext[i : i + 4], "big") for i in range(0, len(plaintext), 4))
    if prompt_hash(salt, token_ids) != admitted.request.prompt_hash:
        raise RemoteProtocolError("the prompt is not the one whose hash was signed")
    if max(token_ids) >= terms.vocab_size:
        raise Refused(RefusalCode.BAD_REQUEST, f"token ids end at {terms.vocab_size - 1}")
    return token_ids


def engine_request(admitted: Admitted, token_ids: tuple[int, ...], stop_ids: tuple[int, ...]) -> EngineRequest:
    """What the engine is asked. The client's address salts the prefix cache: no payer can time another's prompts."""
    request = admitted.request
    return EngineRequest(
        prompt=token_ids,
        seed=admitted.seed,
        max_tokens=request.max_tokens,
        sampling=Sampling(request.temperature_micro, request.top_p_micro, request.top_k),
        stop_ids=stop_ids,
        salt=request.client.rjust(32, b"\0"),
    )
