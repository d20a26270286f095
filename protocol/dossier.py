"""What a provider shows of one audited job, and what anybody can check of it without the model.

A dossier holds the documents of both sides, the prompt with its salt, and the transcript's leaves as they were
recorded. `examine` recomputes the receipt from them, field by field, with the same account that provider and client
ran (work.py), and ties it to the entry of the commitment. What is left for a replay is whether the profile's weights
write those tokens. A private job is shown without prompt and transcript: its documents alone are examined.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from protocol.cache import BLOCK_TOKENS
from protocol.eip712 import Domain, digest, hash_struct
from protocol.errors import FieldOutOfRange, MalformedFrame, TallyError
from protocol.frames import CHUNK_BYTES, DossierChunk, chunked
from protocol.merkle import Entry
from protocol.messages import Accept, JobRequest, Profile, Tariff, WorkReceipt
from protocol.metering import Reasoning, opens_reasoning
from protocol.options import MAX_OPTIONS_BYTES, JobOptions, decode_options, options_hash
from protocol.packing import pack, unpack
from protocol.sampling import derive_seed
from protocol.sealing import BoxKey, Sealed
from protocol.signing import recover_digest, verify
from protocol.tariff import basis_of, check_tariff
from protocol.transcript import (
    LOGPROB_BYTES,
    PROJECTION_BYTES,
    RECORD_BYTES,
    ROUTING_BYTES,
    Leaf,
    Row,
    Transcript,
    prompt_hash,
)
from protocol.units import (
    LEAF_TOKENS,
    MAX_PROMPT_TOKENS,
    ZERO_DIGEST,
    Address,
    Digest,
    FinishReason,
    JobId,
    JobKind,
    Wei,
)
from protocol.work import CLOCK_SLACK_MS, Work, nonce_commitment

ENTRY_BYTES: Final = 76
"""One entry of a commitment's tree as it travels: job id, receipt digest, amount as u96."""

MAX_DOSSIER_CHUNKS: Final = 1024
"""Pieces of one dossier. With 60 KiB each this holds a prompt of 2^20 tokens and two million tokens of output at 30
bytes; doubling it doubles what a validator must be ready to buffer for one job."""

MAX_DOSSIER_BYTES: Final = MAX_DOSSIER_CHUNKS * CHUNK_BYTES

MAX_LEAVES: Final = 1 << 16
"""Leaves, or vectors, of one job: 2^21 tokens, twice the longest context."""

ADMISSION_SLACK_S: Final = 120
"""How long after its tariff's end a job may have been accepted. Unit: s. A provider looks at the tariff when the
request comes and accepts once prompt, escrow and grammar are read, each under a limit of its own; a dossier must not
convict it for that race. A longer one only lets a sheet be used minutes past its end, at prices both had signed."""


class Forged(TallyError):
    """The dossier contradicts itself, its entry or the job's terms; says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Dossier:
    """One job as its provider shows it. `options`: the bytes behind the request's options hash. `salt`: 32 bytes.

    `prompt`: token ids. `content`: each leaf's canonical bytes, or an embedding job's vectors, up to the receipt.
    A private job has neither: salt b"", prompt () and content ().
    """

    request: JobRequest
    request_signature: bytes
    accept: Accept
    accept_signature: bytes
    options: bytes
    tariff: Tariff
    tariff_signature: bytes
    receipt: WorkReceipt
    receipt_signature: bytes
    salt: bytes = b""
    prompt: tuple[int, ...] = ()
    content: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Examined:
    """A dossier whose documents hold. `leaves`: of a generation job; `vectors`: of an embedding one, in order.

    `seed`: 32 bytes the output was drawn from. `private`: neither prompt nor output was shown.
    """

    dossier: Dossier
    options: JobOptions
    seed: Digest
    leaves: tuple[Leaf, ...]
    vectors: tuple[bytes, ...]
    private: bool

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every output token as recorded."""
        return tuple(row for leaf in self.leaves for row in leaf.records())

    @property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """The texts of an embedding job whose vectors the receipt charges for."""
        ends = list(accumulate(self.options.inputs[: len(self.vectors)]))
        return tuple(self.dossier.prompt[start:end] for start, end in zip([0, *ends], ends, strict=False))


# ---------------------------------------------------------------------------------------------------------- as bytes

_Signature = Annotated[bytes, Meta(min_length=65, max_length=65)]
_Document = Annotated[bytes, Meta(max_length=1024)]


class _Wire(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A dossier as msgpack: documents packed (packing.py), the prompt as u32 big-endian."""

    request: _Document
    request_signature: _Signature
    accept: _Document
    accept_signature: _Signature
    options: Annotated[bytes, Meta(max_length=MAX_OPTIONS_BYTES)]
    tariff: _Document
    tariff_signature: _Signature
    receipt: _Document
    receipt_signature: _Signature
    salt: Annotated[bytes, Meta(max_length=32)]
    prompt: Annotated[bytes, Meta(max_length=4 * MAX_PROMPT_TOKENS)]
    content: Annotated[tuple[Annotated[bytes, Meta(max_length=CHUNK_BYTES)], ...], Meta(max_length=MAX_LEAVES)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Wire)


def encode(dossier: Dossier) -> bytes:
    """Raises: FieldOutOfRange when a value does not fit its type, or all of it is above MAX_DOSSIER_BYTES."""
    try:
        prompt = struct.pack(f">{len(dossier.prompt)}I", *dossier.prompt)
    except struct.error as exc:
        raise FieldOutOfRange("Dossier", "prompt", dossier.prompt[:8]) from exc
    wire = _Wire(
        pack(dossier.request),
        dossier.request_signature,
        pack(dossier.accept),
        dossier.accept_signature,
        dossier.options,
        pack(dossier.tariff),
        dossier.tariff_signature,
        pack(dossier.receipt),
        dossier.receipt_signature,
        dossier.salt,
        prompt,
        dossier.content,
    )
    data = _encoder.encode(wire)
    if len(data) > MAX_DOSSIER_BYTES:
        raise FieldOutOfRange("Dossier", "content", len(data))
    return data


def decode(data: bytes) -> Dossier:
    """Raises: MalformedFrame."""
    if len(data) > MAX_DOSSIER_BYTES:
        raise MalformedFrame(f"a dossier of {len(data)} bytes, at most {MAX_DOSSIER_BYTES} are read")
    try:
        wire = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, OverflowError) as exc:
        raise MalformedFrame(str(exc)) from exc
    if len(wire.prompt) % 4:
        raise MalformedFrame(f"a prompt of {len(wire.prompt)} bytes is not made of token ids")
    return Dossier(
        unpack(JobRequest, wire.request),
        wire.request_signature,
        unpack(Accept, wire.accept),
        wire.accept_signature,
        wire.options,
        unpack(Tariff, wire.tariff),
        wire.tariff_signature,
        unpack(WorkReceipt, wire.receipt),
        wire.receipt_signature,
        wire.salt,
        struct.unpack(f">{len(wire.prompt) // 4}I", wire.prompt),
        wire.content,
    )


def pack_entries(entries: Iterable[Entry]) -> bytes:
    """76 bytes each, in the order given. Raises: FieldOutOfRange."""
    out = []
    for entry in entries:
        if len(entry.job_id) != 32 or len(entry.receipt) != 32 or not 0 <= entry.amount < 1 << 96:
            raise FieldOutOfRange("Entry", "job_id, receipt or amount", entry)
        out.append(entry.job_id + entry.receipt + entry.amount.to_bytes(12, "big"))
    return b"".join(out)


def unpack_entries(data: bytes) -> tuple[Entry, ...]:
    """The inverse of `pack_entries`. Raises: MalformedFrame for a length that is no whole number of entries."""
    if len(data) % ENTRY_BYTES:
        raise MalformedFrame(f"{len(data)} bytes are no whole number of entries of {ENTRY_BYTES}")
    return tuple(
        Entry(
            JobId(data[at : at + 32]),
            Digest(data[at + 32 : at + 64]),
            Wei(int.from_bytes(data[at + 64 : at + ENTRY_BYTES], "big")),
        )
        for at in range(0, len(data), ENTRY_BYTES)
    )


class SealedDossiers:
    """One side of an audit stream: dossiers in pieces, sealed between a key pair of the stream and the asker's box key.

    Each piece begins with the provider's 32-byte public key, fresh for every stream, so that the asker needs nothing
    but its own secret. Both sides count pieces over the whole stream: one that is repeated, reordered or altered does
    not open.
    """

    def __init__(self, ours: BoxKey, theirs: bytes | None) -> None:
        """`theirs`: the asker's box key at the provider's side; None at the asker's, which learns the other's.

        Raises: MalformedFrame for a key that keeps no secret.
        """
        self._ours = ours
        self._sealed = None if theirs is None else Sealed(ours, theirs, we_are_client=False)
        self._theirs = b""

    def seal(self, data: bytes) -> list[DossierChunk]:
        """A dossier's bytes as frames. Provider's side only."""
        assert self._sealed is not None
        pieces = chunked(data)
        return [
            DossierChunk(index, len(pieces), self._ours.public + self._sealed.seal(piece))
            for index, piece in enumerate(pieces)
        ]

    def unseal(self, chunk: DossierChunk) -> bytes:
        """One piece. Asker's side only. Raises: MalformedFrame."""
        public, ciphertext = chunk.sealed[:32], chunk.sealed[32:]
        if self._sealed is None:
            self._theirs = public
            self._sealed = Sealed(self._ours, public, we_are_client=True)
        if public != self._theirs:
            raise MalformedFrame("a dossier changed its key on the way")
        return self._sealed.unseal(ciphertext)


def read_leaf(data: bytes, *, routed: bool) -> Leaf:
    """A leaf from its canonical bytes; `routed`: of a mixture of experts. Raises: FieldOutOfRange, MalformedFrame."""
    width = RECORD_BYTES + (ROUTING_BYTES if routed else 0)
    if not data or len(data) % width:
        raise MalformedFrame(f"a leaf of {len(data)} bytes is not made of records of {width}")
    scores = 4 + LOGPROB_BYTES
    rows = []
    for at in range(0, len(data), width):
        record = data[at : at + width]
        token_id = int.from_bytes(record[:4], "big")
        evidence = record[scores : scores + PROJECTION_BYTES]
        rows.append(Row(token_id, record[4:scores], evidence, record[scores + PROJECTION_BYTES :]))
    return Leaf.of(rows)


# ---------------------------------------------------------------------------------------------------------- examining


def examine(
    dossier: Dossier,
    entry: Entry,
    domain: Domain,
    node_keys: Collection[Address],
    profile: Profile,
    period: tuple[int, int] | None = None,
) -> Examined:
    """What the documents prove: that this is the entry's job, agreed, priced and recorded as the receipt says.

    `node_keys`: whose signatures count as the provider's: keys that it has or had, for a key may be changed between a
    job and its audit. `profile`: the one the commitment is under. `period`: Unix ms
    from and before which the job must have been received. Raises: Forged with the reason; nothing else.
    """
    try:
        return _examine(dossier, entry, domain, node_keys, profile, period)
    except Forged:
        raise
    except (TallyError, ValueError) as exc:  # ValueError: a number that is no tier, kind or finish reason
        raise Forged(str(exc)) from exc


def _need(condition: bool, why: str) -> None:
    if not condition:
        raise Forged(why)


def _signed(domain: Domain, document: Any, signature: bytes, node_keys: Collection[Address]) -> Digest:
    """The digest of a document that one of the provider's keys signed. Raises: Forged."""
    found = digest(domain, document)
    signer = recover_digest(found, signature)
    name = type(document).__name__
    _need(signer in node_keys, f"the signature of {name} is of {_hex(signer or b'')}, which is no key of the provider")
    return found


def _hex(value: bytes) -> str:
    return "0x" + value.hex()


def _examine(
    dossier: Dossier,
    entry: Entry,
    domain: Domain,
    node_keys: Collection[Address],
    profile: Profile,
    period: tuple[int, int] | None,
) -> Examined:
    request, receipt = dossier.request, dossier.receipt
    job_id = JobId(verify(domain, request, dossier.request_signature, Address(request.client)))
    _need(job_id == entry.job_id, f"the request is of job {_hex(job_id)}, the entry of job {_hex(entry.job_id)}")
    _need(request.profile_id == hash_struct(profile), "the request names another profile than the commitment")
    found = options_hash(dossier.options)
    _need(found == request.options_hash, f"the options hash to {_hex(found)}, which the request did not sign")
    options = decode_options(dossier.options)
    _check_accept(dossier, job_id, domain, node_keys)
    _check_tariff(dossier, domain, node_keys)
    _check_entry(dossier, entry, domain, node_keys)
    if period is not None:
        _need(period[0] <= receipt.received_at < period[1], "the job was received in another epoch")
    content = _Content(profile, dossier, options)
    _check_prompt(dossier, profile, options)
    _check_receipt(dossier, profile, options, job_id, content)
    _check_finish(dossier, options, content.tokens)
    return Examined(
        dossier, options, Digest(dossier.accept.seed), content.leaves, content.vectors, bool(request.is_private)
    )


def _check_accept(dossier: Dossier, job_id: JobId, domain: Domain, node_keys: Collection[Address]) -> None:
    request, accept = dossier.request, dossier.accept
    _signed(domain, accept, dossier.accept_signature, node_keys)
    _need(bytes(accept.job_id) == job_id, f"the acceptance is of job {_hex(accept.job_id)}")
    opened = nonce_commitment(accept.provider_nonce)
    _need(opened == request.provider_commitment, "the acceptance opens another nonce than the quote committed to")
    continued = (request.parent_job != ZERO_DIGEST, request.parent_seed != ZERO_DIGEST)
    _need(continued[0] == continued[1], "a continuation names its parent job and the parent's seed, or neither")
    seed = derive_seed(job_id, request.client_nonce, accept.provider_nonce)
    if continued[0]:
        seed = Digest(request.parent_seed)
    _need(accept.seed == seed, f"the seed {_hex(accept.seed)} is not the one the nonces give, {_hex(seed)}")


def _check_tariff(dossier: Dossier, domain: Domain, node_keys: Collection[Address]) -> None:
    request, tariff = dossier.request, dossier.tariff
    tariff_hash = _signed(domain, tariff, dossier.tariff_signature, node_keys)
    _need(tariff_hash == request.tariff_hash, f"the tariff {_hex(tariff_hash)} is not the one the request names")
    same = (tariff.provider, tariff.profile_id) == (request.provider, request.profile_id)
    _need(same, "the tariff is of another provider or profile than the request")
    check_tariff(tariff)
    at = dossier.accept.accepted_at // 1000
    _need(
        tariff.valid_from <= at < tariff.valid_until + ADMISSION_SLACK_S,
        f"the job was accepted at {at}, its tariff is in force from {tariff.valid_from} until {tariff.valid_until}",
    )


def _check_entry(dossier: Dossier, entry: Entry, domain: Domain, node_keys: Collection[Address]) -> None:
    """The receipt is the one that was committed to."""
    receipt, request = dossier.receipt, dossier.request
    found = _signed(domain, receipt, dossier.receipt_signature, node_keys)
    _need(found == entry.receipt, f"the receipt has digest {_hex(found)}, the entry holds {_hex(entry.receipt)}")
    stands = f"the entry holds {entry.amount} wei, the receipt comes to {receipt.total}"
    _need(entry.amount == receipt.total, stands)
    _need(receipt.total <= request.price_ceiling, "the receipt is above the ceiling the client set")
    _need(basis_of(receipt) == basis_of(request), "the receipt prices another kind, tier or base than the request")


class _Content:
    """The transcript as shown: `leaves` or `vectors`, and the output `tokens` in order."""

    def __init__(self, profile: Profile, dossier: Dossier, options: JobOptions) -> None:
        self.leaves: tuple[Leaf, ...] = ()
        self.vectors: tuple[bytes, ...] = ()
        if dossier.request.kind == JobKind.EMBED:
            self.vectors = dossier.content
            _need(len(self.vectors) <= len(options.inputs), "there are more vectors than texts")
            widths = {len(vector) for vector in self.vectors}
            _need(len(widths) <= 1, "the vectors have different lengths")
            _need(not any(width % 4 or not width for width in widths), "a vector is not made of fp32 values")
            asked = options.dimensions
            _need(not asked or widths <= {4 * asked}, f"the vectors have other than {asked} dimensions")
        else:
            routed = bool(profile.moe_layers)
            self.leaves = tuple(read_leaf(data, routed=routed) for data in dossier.content)
        self.tokens = tuple(token for leaf in self.leaves for token in leaf.token_ids)


def _check_prompt(dossier: Dossier, profile: Profile, options: JobOptions) -> None:
    request = dossier.request
    if request.is_private:
        shown = bool(dossier.prompt or dossier.content or dossier.salt)
        _need(not shown, "content of a private job was shown")
        return
    _need(len(dossier.prompt) == request.prompt_tokens, f"the prompt shown has {len(dossier.prompt)} tokens")
    _need(prompt_hash(dossier.salt, dossier.prompt) == request.prompt_hash, "the prompt is not the one that was signed")
    if request.kind != JobKind.EMBED:
        opened = opens_reasoning(profile, dossier.prompt)
        _need(options.reasoning_open == opened, "the prompt's reasoning block is not as the options say")


def _check_receipt(dossier: Dossier, profile: Profile, options: JobOptions, job_id: JobId, content: _Content) -> None:
    """Every field of the receipt follows from the transcript, the request and the tariff; the clock, what was cached
    and the highest voucher are the provider's word."""
    receipt, request = dossier.receipt, dossier.request
    finish = FinishReason(receipt.finish_reason)
    start = Work.start(job_id, request, options, dossier.tariff, profile, dossier.accept, ())
    transcript, reasoning = _account(dossier, start, content)
    _check_order(receipt, start, transcript)
    work = replace(
        start,
        transcript=transcript,
        reasoning=reasoning,
        # The cache salt stays with the payer, so that no head can be hashed again: those stated stand in for ours.
        heads=(Digest(receipt.cache_head),) * (receipt.cached_tokens // BLOCK_TOKENS + 1),
        cached_tokens=receipt.cached_tokens,
        first_token_at=receipt.first_token_at,
        step=receipt.step - 1,
        previous=Digest(receipt.previous),
        waited_ms=receipt.waited_ms,
    )
    # The account closes a leaf of pending rows for an interim receipt; here all rows are in leaves already.
    _, expected = work.receipt(FinishReason.STOP, receipt.finished_at, Wei(receipt.vouched))
    expected = replace(
        expected,
        is_final=receipt.is_final,
        finish_reason=finish,
        is_kept=receipt.is_kept,
        prompt_head=receipt.prompt_head,
    )
    for item in fields(WorkReceipt):
        claimed, found = getattr(receipt, item.name), getattr(expected, item.name)
        _need(
            claimed == found, f"the receipt states {item.name} {_shown(claimed)}, the transcript gives {_shown(found)}"
        )


def _shown(value: Any) -> str:
    return _hex(value) if isinstance(value, bytes) else str(value)


def _account(dossier: Dossier, start: Work, content: _Content) -> tuple[Transcript, Reasoning]:
    """Transcript and reasoning count: from what was shown, or of a private job as the receipt states them."""
    receipt, transcript = dossier.receipt, start.transcript
    if not dossier.request.is_private:
        for vector in content.vectors:
            transcript = transcript.extend_vector(vector)
        for leaf in content.leaves:
            transcript = transcript.extend(leaf)
        return transcript, start.reasoning.take(content.tokens)
    texts = 0
    if start.embeds:
        ends = list(accumulate(start.options.inputs))
        _need(receipt.prompt_tokens in (0, *ends), "the receipt charges for a part of a text")
        texts = ends.index(receipt.prompt_tokens) + 1 if receipt.prompt_tokens else 0
    tokens = 0 if start.embeds else receipt.completion_tokens
    stated = replace(
        transcript,
        head=Digest(receipt.leaves_root),
        leaves=texts or -(-tokens // LEAF_TOKENS),
        tokens=tokens,
        routing=Digest(receipt.routing_root),
    )
    _need(receipt.reasoning_tokens <= tokens, "the receipt counts more reasoning than output")
    return stated, replace(start.reasoning, tokens=receipt.reasoning_tokens)


def _check_order(receipt: WorkReceipt, start: Work, transcript: Transcript) -> None:
    """Steps, counts and times in themselves."""
    request, done = start.request, transcript.tokens
    _need(receipt.step >= 1, "receipts are counted from 1")
    _need((receipt.step == 1) == (receipt.previous == ZERO_DIGEST), "the receipt's step does not fit its predecessor")
    _need(receipt.is_final == (receipt.finish_reason != FinishReason.OPEN), "the receipt is final and open, or neither")
    _need(receipt.is_final == bool(receipt.finished_at), "the receipt is final or has an end, not both")
    _need(done <= request.max_tokens, f"{done} tokens, {request.max_tokens} were asked for")
    full, rest = divmod(done, LEAF_TOKENS)
    steps = (full, full + 1) if receipt.is_final and not rest else (full + bool(rest),)
    _need(start.embeds or receipt.step in steps, f"receipt {receipt.step} covers {done} tokens")
    _need(receipt.is_final or (not rest and done > 0), "an interim receipt covers whole leaves")
    begun = bool(done or (start.embeds and transcript.leaves))
    first = receipt.first_token_at
    _need(bool(first) == begun, "the receipt has output or a first token, not both")
    _need(not first or first >= receipt.received_at, "the first token came before the job")
    late = max(first, receipt.received_at)
    _need(not receipt.is_final or receipt.finished_at >= late, "the job ended before it began")
    # SPEC 5.7: Cached tokens are whole blocks of 32, at least one token of the prompt is computed
    whole = receipt.cached_tokens % LEAF_TOKENS == 0 and receipt.cached_tokens < max(1, request.prompt_tokens)
    _need(whole, f"{receipt.cached_tokens} tokens of the prompt cannot be cached")


def _check_finish(dossier: Dossier, options: JobOptions, tokens: Sequence[int]) -> None:
    """A reason to end that the output itself contradicts. EOS is no part of the profile: a replay knows it."""
    request, receipt = dossier.request, dossier.receipt
    finish, done = FinishReason(receipt.finish_reason), receipt.completion_tokens
    _need(finish is not FinishReason.ERROR, "a job that failed has no receipt for its failure")
    early = finish is FinishReason.DEADLINE and receipt.finished_at + CLOCK_SLACK_MS < request.deadline
    _need(not early, "the job ended by a deadline that had not come")
    if request.kind == JobKind.EMBED:
        complete = receipt.prompt_tokens == sum(options.inputs)
        _need(finish is not FinishReason.LENGTH, "an embedding job cannot end by length")
        _need(complete == (finish is FinishReason.STOP), "the embedding job stopped before its last text, or after it")
        return
    over = done == request.max_tokens
    _need(finish is not FinishReason.LENGTH or over, f"finish reason length after {done} of {request.max_tokens}")
    ended = finish in (FinishReason.LENGTH, FinishReason.STOP)
    _need(not over or ended, f"all tokens were written and the job ended by {finish.name.lower()}")
    stops = set(options.stop_ids)
    _need(not any(token in stops for token in tokens[:-1]), "tokens follow a stop token")
    _need(
        not (tokens and tokens[-1] in stops) or finish is FinishReason.STOP, "the text ended and the job did not stop"
    )
