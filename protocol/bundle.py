"""One job's documents together, and what anybody can check of them with nothing else at hand.

A bundle holds both halves of the stick: request, acceptance, tariff and the chain of receipts, with the signatures of
the provider's node key and of the client's session key. `verify` recomputes everything from the documents alone. Two
things no document can prove: that the node key belongs to the provider's wallet (the Registry says so), and which
tokens stand behind a leaves root (an audit recomputes them). protocol/bundle_json.py gives a bundle its JSON form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from itertools import accumulate, pairwise

from protocol.cache import BLOCK_TOKENS, hit_limit
from protocol.eip712 import Domain, digest, hash_struct
from protocol.errors import TallyError
from protocol.messages import Accept, JobRequest, Profile, ReceiptAck, Tariff, Voucher, WorkReceipt
from protocol.metering import Reasoning, Usage, job_ste_micro
from protocol.options import decode_options, options_hash
from protocol.sampling import derive_seed
from protocol.signing import verify as verify_signature
from protocol.tariff import Cost, Timing, basis_of, check_in_force, check_tariff, cost_up
from protocol.transcript import Transcript
from protocol.units import LEAF_TOKENS, ZERO_DIGEST, Address, Digest, FinishReason, JobId, JobKind


@dataclass(frozen=True, slots=True)
class Notch:
    """One increment: a receipt and what acknowledges it. Signatures are b"" where the exporter held none.

    `digest`: as the exporter stored it. `token_ids`: this increment's, () where they were not kept.
    """

    digest: Digest
    receipt: WorkReceipt
    receipt_signature: bytes
    voucher: Voucher | None = None
    voucher_signature: bytes = b""
    ack_signature: bytes = b""
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Bundle:
    """One job. `node_key`: address whose signatures count as the provider's. `tariff`, `profile` None: not kept.

    `options`: the bytes behind the request's options hash.
    """

    domain: Domain
    node_key: Address
    request: JobRequest
    request_signature: bytes
    accept: Accept
    accept_signature: bytes
    options: bytes
    profile: Profile | None
    tariff: Tariff | None
    tariff_signature: bytes
    notches: tuple[Notch, ...]

    @property
    def job_id(self) -> JobId:
        """The request's digest. Raises: FieldOutOfRange."""
        return JobId(digest(self.domain, self.request))


class Outcome(StrEnum):
    """SKIP: the bundle does not hold what the check needs."""

    OK = "ok"
    FAIL = "FAIL"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked, what came out, and why."""

    name: str
    outcome: Outcome
    detail: str


# -------------------------------------------------------------------------------------------------------------- verify


class _Wrong(Exception):
    """The check fails, and this is why."""


class _Missing(Exception):
    """The bundle does not hold what the check needs."""


def verify(bundle: Bundle) -> list[Check]:
    """Every check of one job, in the order of its life. Never raises for what a bundle holds."""
    rules: tuple[tuple[str, Callable[[Bundle], str]], ...] = (
        ("request", _request),
        ("options", _options),
        ("acceptance", _acceptance),
        ("tariff", _tariff),
        ("receipt signatures", _receipt_signatures),
        ("step chain", _step_chain),
        ("counts", _counts),
        ("times", _times),
        ("cost", _cost),
        ("work", _work),
        ("vouchers", _vouchers),
        ("acknowledgement", _acknowledgement),
        ("token ids", _token_ids),
    )
    return [_outcome(name, rule, bundle) for name, rule in rules]


def passed(checks: Iterable[Check]) -> bool:
    """Whether no check failed."""
    return all(check.outcome is not Outcome.FAIL for check in checks)


def _outcome(name: str, rule: Callable[[Bundle], str], bundle: Bundle) -> Check:
    try:
        return Check(name, Outcome.OK, rule(bundle))
    except _Missing as exc:
        return Check(name, Outcome.SKIP, str(exc))
    except (_Wrong, TallyError, ValueError) as exc:  # ValueError: a number that is no Tier or FinishReason
        return Check(name, Outcome.FAIL, str(exc))


def _need(condition: bool, why: str) -> None:
    if not condition:
        raise _Wrong(why)


def _hex(value: bytes) -> str:
    return "0x" + value.hex()


def _request(bundle: Bundle) -> str:
    request = bundle.request
    job_id = verify_signature(bundle.domain, request, bundle.request_signature, request.client)
    return f"job {_hex(job_id)} was asked for by session key {_hex(request.client)}"


def _options(bundle: Bundle) -> str:
    """Raises: MalformedFrame, which is a TallyError, when the options do not decode."""
    found = options_hash(bundle.options)
    signed = bundle.request.options_hash
    _need(found == signed, f"their hash {_hex(found)} is not the one the request signed, {_hex(signed)}")
    options = decode_options(bundle.options)
    said = [f"{len(options.stop_ids)} stop ids", f"syntax {options.syntax.name.lower()}"]
    return "the request signed them: " + ", ".join(said)


def _acceptance(bundle: Bundle) -> str:
    request, accept, job_id = bundle.request, bundle.accept, bundle.job_id
    verify_signature(bundle.domain, accept, bundle.accept_signature, bundle.node_key)
    _need(bytes(accept.job_id) == job_id, f"it accepts job {_hex(accept.job_id)}, the request is job {_hex(job_id)}")
    opened = hashlib.sha256(accept.provider_nonce).digest()
    _need(opened == request.provider_commitment, "it opens another nonce than the provider had committed to")
    if request.parent_job == ZERO_DIGEST:
        seed = derive_seed(job_id, request.client_nonce, accept.provider_nonce)
    else:
        seed = Digest(request.parent_seed)
    _need(accept.seed == seed, f"its seed {_hex(accept.seed)} is not the one the nonces give, {_hex(seed)}")
    return f"accepted by node key {_hex(bundle.node_key)}; the seed follows from both nonces"


def _tariff(bundle: Bundle) -> str:
    if bundle.tariff is None:
        raise _Missing("the bundle holds no tariff")
    tariff, request = bundle.tariff, bundle.request
    tariff_hash = verify_signature(bundle.domain, tariff, bundle.tariff_signature, bundle.node_key)
    _need(tariff_hash == request.tariff_hash, f"its hash {_hex(tariff_hash)} is not the one the request names")
    same = (tariff.provider, tariff.profile_id) == (request.provider, request.profile_id)
    _need(same, "it is of another provider or profile than the request")
    check_tariff(tariff)
    check_in_force(tariff, bundle.accept.accepted_at // 1000)
    return f"{_hex(tariff_hash)} was in force when the job was accepted"


def _receipt_signatures(bundle: Bundle) -> str:
    if not bundle.notches:
        raise _Missing("the bundle holds no receipt")
    signed = 0
    for notch in bundle.notches:
        step = notch.receipt.step
        found = digest(bundle.domain, notch.receipt)
        _need(found == notch.digest, f"receipt {step} has digest {_hex(found)}, stored as {_hex(notch.digest)}")
        if notch.receipt_signature:
            verify_signature(bundle.domain, notch.receipt, notch.receipt_signature, bundle.node_key)
            signed += 1
    if not signed:
        raise _Missing("the digests recompute; no receipt's signature is in the bundle")
    return f"{signed} of {len(bundle.notches)} receipts carry the node key's signature; all digests recompute"


def _step_chain(bundle: Bundle) -> str:
    if not bundle.notches:
        raise _Missing("the bundle holds no receipt")
    request, job_id, previous = bundle.request, bundle.job_id, ZERO_DIGEST
    for number, notch in enumerate(bundle.notches, start=1):
        receipt = notch.receipt
        _need(receipt.step == number, f"receipt {receipt.step} stands where receipt {number} belongs")
        _need(bytes(receipt.job_id) == job_id, f"receipt {number} is of job {_hex(receipt.job_id)}")
        parties = (receipt.provider, receipt.client, receipt.tariff_hash)
        _need(
            parties == (request.provider, request.client, request.tariff_hash),
            f"receipt {number} names another provider, client or tariff than the request",
        )
        _need(receipt.previous == previous, f"receipt {number} follows {_hex(receipt.previous)}, not the one before it")
        final = FinishReason(receipt.finish_reason) is not FinishReason.OPEN
        _need(receipt.is_final == final, f"receipt {number} is final and open at once, or neither")
        _need(not final or number == len(bundle.notches), f"receipt {number} is final, but others follow it")
        previous = digest(bundle.domain, receipt)
    last = bundle.notches[-1].receipt
    end = f"ended by {FinishReason(last.finish_reason).name.lower()}" if last.is_final else "never ended by END"
    return f"{len(bundle.notches)} receipts, each naming the one before it; {end}"


def _counts(bundle: Bundle) -> str:
    if not bundle.notches:
        raise _Missing("the bundle holds no receipt")
    request = bundle.request
    before, head = 0, Transcript.start(bundle.job_id).head
    for number, notch in enumerate(bundle.notches, start=1):
        receipt = notch.receipt
        Usage(receipt.prompt_tokens, receipt.cached_tokens, receipt.completion_tokens, receipt.reasoning_tokens)
        _need(basis_of(receipt) == basis_of(request), f"receipt {number} prices another kind, tier or base")
        _need(receipt.prompt_tokens == _prompt(bundle, receipt), f"receipt {number} counts another prompt")
        _check_cache(bundle, receipt)
        fresh = receipt.completion_tokens - before
        least = 0 if receipt.is_final else LEAF_TOKENS
        _need(least <= fresh <= LEAF_TOKENS, f"receipt {number} covers {fresh} new tokens")
        _need(receipt.completion_tokens <= request.max_tokens, f"receipt {number} counts more than max_tokens")
        produced = fresh > 0 or (_embeds(bundle) and receipt.prompt_tokens > 0)
        _need((receipt.leaves_root != head) == produced, f"receipt {number}'s leaves root does not fit its new tokens")
        before, head = receipt.completion_tokens, Digest(receipt.leaves_root)
    last = bundle.notches[-1].receipt
    by_length, stopped = (last.finish_reason == reason for reason in (FinishReason.LENGTH, FinishReason.STOP))
    if _embeds(bundle):
        done = last.prompt_tokens == sum(decode_options(bundle.options).inputs)
        _need(not by_length and stopped == done, f"embedding ended by reason {last.finish_reason}, done: {done}")
    _need(not by_length or before == request.max_tokens, f"finish reason length after {before} of {request.max_tokens}")
    return f"{request.prompt_tokens} prompt tokens ({last.cached_tokens} cached), {before} completion tokens"


def _check_cache(bundle: Bundle, receipt: WorkReceipt) -> None:
    """A hit is whole blocks that the prompt can have, of a named prompt, and the same in every receipt."""
    # SPEC 5.7: Cached tokens are whole blocks of 32, at least one token of the prompt is computed
    first, number = bundle.notches[0].receipt, receipt.step
    said = (receipt.cached_tokens, receipt.cache_head, receipt.prompt_head, receipt.is_kept)
    before = (first.cached_tokens, first.cache_head, first.prompt_head, first.is_kept)
    _need(said == before, f"receipt {number} states another cache hit or prompt than the first")
    limit = 0 if _embeds(bundle) or receipt.prompt_head == ZERO_DIGEST else hit_limit(receipt.prompt_tokens)
    _need(receipt.cached_tokens <= limit, f"receipt {number} counts {receipt.cached_tokens} cached, at most {limit}")
    _need(receipt.cached_tokens % BLOCK_TOKENS == 0, f"receipt {number} counts a part of a block as cached")
    hit = receipt.cache_head != ZERO_DIGEST
    _need(hit == (receipt.cached_tokens > 0), f"receipt {number} counts cached tokens or names them, not both")
    named = receipt.prompt_head != ZERO_DIGEST
    _need(named or not receipt.is_kept, f"receipt {number} keeps a prompt that it does not name")
    can = not _embeds(bundle) and receipt.prompt_tokens >= BLOCK_TOKENS
    _need(can or not named, f"receipt {number} names a prompt that has no block to cache")


def _embeds(bundle: Bundle) -> bool:
    return bundle.request.kind == JobKind.EMBED


def _prompt(bundle: Bundle, receipt: WorkReceipt) -> int:
    """What may be charged as prompt: all of it, or the embedding texts up to one of their ends."""
    if not _embeds(bundle):
        return bundle.request.prompt_tokens
    ends = [0, *accumulate(decode_options(bundle.options).inputs)]
    return max(end for end in ends if end <= receipt.prompt_tokens)


def _times(bundle: Bundle) -> str:
    if not bundle.notches:
        raise _Missing("the bundle holds no receipt")
    for number, receipt in enumerate((notch.receipt for notch in bundle.notches), start=1):
        first = receipt.first_token_at
        _need(
            receipt.received_at == bundle.accept.accepted_at, f"receipt {number} starts at another time than the Accept"
        )
        begun = bool(receipt.completion_tokens or (_embeds(bundle) and receipt.prompt_tokens))
        _need(bool(first) == begun, f"receipt {number} has tokens or a first token, not both")
        _need(not first or first >= receipt.received_at, f"receipt {number}'s first token came before the job")
        _need(receipt.is_final == bool(receipt.finished_at), f"receipt {number} is final or has an end, not both")
        _need(
            not receipt.is_final or receipt.finished_at >= max(first, receipt.received_at),
            "the end is before the start",
        )
    firsts = {notch.receipt.first_token_at for notch in bundle.notches if notch.receipt.completion_tokens}
    _need(len(firsts) <= 1, "the time of the first token changes between receipts")
    last = bundle.notches[-1].receipt
    waited = f"first token after {last.first_token_at - last.received_at} ms" if last.first_token_at else "no token"
    return f"{waited}, {last.finished_at - last.received_at} ms in all" if last.is_final else waited


def _cost(bundle: Bundle) -> str:
    if bundle.tariff is None or not bundle.notches:
        raise _Missing("the bundle holds no tariff to recompute the cost from" if bundle.notches else "no receipt")
    request = bundle.request
    for notch in bundle.notches:
        receipt = notch.receipt
        expected = cost_up(
            bundle.tariff,
            Usage(receipt.prompt_tokens, receipt.cached_tokens, receipt.completion_tokens, receipt.reasoning_tokens),
            basis_of(request),
            Timing(receipt.received_at, receipt.first_token_at, receipt.finished_at, receipt.waited_ms),
        )
        for item in fields(Cost):
            claimed, found = getattr(receipt, item.name), getattr(expected, item.name)
            _need(claimed == found, f"receipt {receipt.step} claims {item.name} {claimed}, the tariff gives {found}")
        _need(receipt.total <= request.price_ceiling, f"receipt {receipt.step} is above the ceiling the client set")
    return f"{bundle.notches[-1].receipt.total} wei, recomputed line by line from the tariff for every receipt"


def _work(bundle: Bundle) -> str:
    """STE from the profile's shape, and reasoning tokens where the bundle has the ids."""
    if bundle.profile is None or not bundle.notches:
        raise _Missing("the bundle holds no profile to recompute the work from" if bundle.notches else "no receipt")
    profile, found = bundle.profile, hash_struct(bundle.profile)
    _need(found == bundle.request.profile_id, f"the profile's id {_hex(found)} is not the one the request names")
    options = decode_options(bundle.options)
    reasoning = Reasoning(profile.reasoning_start, profile.reasoning_end, options.reasoning_open)
    known = True
    for notch in bundle.notches:
        receipt = notch.receipt
        known = known and (bool(notch.token_ids) or not receipt.completion_tokens)
        reasoning = reasoning.take(notch.token_ids)
        usage = Usage(receipt.prompt_tokens, receipt.cached_tokens, receipt.completion_tokens, receipt.reasoning_tokens)
        texts = None
        if _embeds(bundle):
            ends = accumulate(options.inputs)
            texts = [n for n, end in zip(options.inputs, ends, strict=True) if end <= receipt.prompt_tokens]
        else:
            counted, ours = receipt.reasoning_tokens, reasoning.tokens
            _need(not known or counted == ours, f"receipt {receipt.step} counts {counted} reasoning tokens, not {ours}")
        routed = bool(profile.moe_layers and receipt.completion_tokens)
        stated = receipt.routing_root != ZERO_DIGEST
        _need(stated == routed, f"receipt {receipt.step}'s routing root does not fit the profile's routed layers")
        ste = job_ste_micro(profile, usage, texts)
        _need(receipt.ste_micro == ste, f"receipt {receipt.step} claims {receipt.ste_micro} micro-STE, not {ste}")
    return f"{bundle.notches[-1].receipt.ste_micro} micro-STE, recomputed from the profile's shape for every receipt"


def _vouchers(bundle: Bundle) -> str:
    held = [(notch.receipt, notch.voucher, notch.voucher_signature) for notch in bundle.notches if notch.voucher]
    if not held:
        raise _Missing("the bundle holds no voucher")
    signed = 0
    for receipt, voucher, signature in held:
        assert voucher is not None
        _need(
            voucher.provider == bundle.request.provider,
            f"the voucher for receipt {receipt.step} is for another provider",
        )
        _need(
            voucher.cumulative >= receipt.total,
            f"the voucher for receipt {receipt.step} promises {voucher.cumulative} wei, the receipt {receipt.total}",
        )
        if signature:
            verify_signature(bundle.domain, voucher, signature, bundle.request.client)
            signed += 1
    amounts = [voucher.cumulative for _, voucher, _ in held if voucher]
    _need(all(a <= b for a, b in pairwise(amounts)), "a later voucher promises less than an earlier one")
    if not signed:
        raise _Missing("the amounts cover the receipts; no voucher's signature is in the bundle")
    owed = held[-1][0].total
    return f"receipts up to {owed} wei are covered; {signed} of {len(held)} vouchers carry the session key's signature"


def _acknowledgement(bundle: Bundle) -> str:
    found = 0
    for notch in bundle.notches:
        if notch.ack_signature:
            _need(notch.receipt.is_final, f"receipt {notch.receipt.step} is acknowledged but not final")
            verify_signature(bundle.domain, ReceiptAck(notch.digest), notch.ack_signature, bundle.request.client)
            found += 1
    if not found:
        raise _Missing("the client's acknowledgement of the final receipt is not in the bundle")
    return "the client's session key signed the final receipt's digest: the halves match"


def _token_ids(bundle: Bundle) -> str:
    if not any(notch.token_ids for notch in bundle.notches):
        raise _Missing("the bundle holds no token ids")
    before = 0
    for notch in bundle.notches:
        fresh = notch.receipt.completion_tokens - before
        _need(
            len(notch.token_ids) == fresh,
            f"receipt {notch.receipt.step} covers {fresh} tokens, {len(notch.token_ids)} listed",
        )
        before = notch.receipt.completion_tokens
    return f"{before} token ids, as many as the receipts count; which ones, an audit of the leaves root tells"
