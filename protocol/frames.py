"""The frames of /tally/job/1, /tally/offers/1, /tally/card/1 and /tally/audit/1: what travels, encoded and bounded.

A frame is a msgpack array whose first element is the tag (protocol/README.md section 3); framing.py adds the u32
length. Decoding validates types and sizes; anything else raises MalformedFrame, which costs the sender its stream.
A signed document is a `Packed` byte string (packing.py) that the reader unpacks by the type named beside the field.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from protocol.errors import FrameTooLarge, MalformedFrame
from protocol.options import MAX_ALTERNATIVES, MAX_OPTIONS_BYTES
from protocol.units import LEAF_TOKENS, MAX_FRAME_BYTES

JOB_PROTOCOL = "/tally/job/1"
OFFERS_PROTOCOL = "/tally/offers/1"
CARD_PROTOCOL = "/tally/card/1"
AUDIT_PROTOCOL = "/tally/audit/1"

CHUNK_BYTES = 60 * 1024
"""Payload of one chunk of a prompt or a card: a frame less generous room for its header and seal."""

Signature = Annotated[bytes, Meta(min_length=65, max_length=65)]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Wallet = Annotated[bytes, Meta(min_length=20, max_length=20)]
Short = Annotated[str, Meta(max_length=256)]
Reason = Annotated[str, Meta(max_length=1024)]
Chunk = Annotated[bytes, Meta(max_length=CHUNK_BYTES + 64)]
Packed = Annotated[bytes, Meta(max_length=1024)]
Count = Annotated[int, Meta(ge=0, lt=1 << 32)]
Alternatives = Annotated[
    tuple[tuple[Count, Annotated[bytes, Meta(min_length=2, max_length=2)]], ...], Meta(max_length=MAX_ALTERNATIVES)
]
Time = Annotated[int, Meta(ge=0, lt=1 << 63)]


class RefusalCode(StrEnum):
    """Why a job was refused or aborted; the gateway maps each to an HTTP status."""

    BAD_REQUEST = "bad_request"
    CONTEXT_LENGTH = "context_length_exceeded"
    UNKNOWN_MODEL = "model_not_found"
    PAYMENT_REQUIRED = "insufficient_escrow"
    TARIFF = "tariff_not_in_force"
    CEILING = "price_ceiling"
    BUSY = "busy"
    DUPLICATE = "duplicate_job"
    DRAINING = "draining"
    INTERNAL = "internal"


class QuoteAsk(Struct, frozen=True, array_like=True, tag=1, forbid_unknown_fields=True):
    """Client: could you serve this, and how soon?"""

    client: Wallet
    profile_id: Hash
    prompt_tokens: Count
    max_tokens: Count
    tier: Annotated[int, Meta(ge=0, le=2)]


class Quote(Struct, frozen=True, array_like=True, tag=2, forbid_unknown_fields=True):
    """Provider: yes; `commitment` is SHA-256 of the nonce it will open, `queue_ms` its estimate to first token."""

    commitment: Hash
    tariff_hash: Hash
    queue_ms: Count


class Request(Struct, frozen=True, array_like=True, tag=3, forbid_unknown_fields=True):
    """Client: the signed job. `prompt_chunks` PromptChunk frames follow, sealed to `box_key`.

    `cache_salt`: 32 secret bytes that name the payer's prefix cache, or none for no caching (cache.py).
    """

    request: Packed  # JobRequest
    signature: Signature
    box_key: Hash
    salt: Hash
    cache_salt: Annotated[bytes, Meta(max_length=32)]
    options: Annotated[bytes, Meta(max_length=MAX_OPTIONS_BYTES)]  # JobOptions, as hashed
    prompt_chunks: Annotated[int, Meta(ge=1, le=128)]


class PromptChunk(Struct, frozen=True, array_like=True, tag=4, forbid_unknown_fields=True):
    """Client: a sealed piece of the prompt, token ids as u32 big-endian."""

    sealed: Chunk


class Accepted(Struct, frozen=True, array_like=True, tag=5, forbid_unknown_fields=True):
    """Provider: the job is taken and its nonce opened."""

    accept: Packed  # Accept
    signature: Signature


class Refuse(Struct, frozen=True, array_like=True, tag=6, forbid_unknown_fields=True):
    """Provider: no. Nothing is owed."""

    code: Short
    reason: Reason


class Tokens(Struct, frozen=True, array_like=True, tag=7, forbid_unknown_fields=True):
    """Provider: sealed `TokenBatch`."""

    sealed: Chunk


class Receipt(Struct, frozen=True, array_like=True, tag=8, forbid_unknown_fields=True):
    """Provider: an interim receipt over everything sent so far."""

    receipt: Packed  # WorkReceipt
    signature: Signature


class VoucherFrame(Struct, frozen=True, array_like=True, tag=9, forbid_unknown_fields=True):
    """Client: the receipt of `step` recomputed; this much is promised in all."""

    step: Count
    voucher: Packed  # Voucher
    signature: Signature


class End(Struct, frozen=True, array_like=True, tag=10, forbid_unknown_fields=True):
    """Provider: the final receipt. A stream that ends without it failed."""

    receipt: Packed  # WorkReceipt
    signature: Signature


class Ack(Struct, frozen=True, array_like=True, tag=11, forbid_unknown_fields=True):
    """Client: the other half of the stick, and the voucher that pays for it."""

    ack: Packed  # ReceiptAck
    signature: Signature
    voucher: Packed  # Voucher
    voucher_signature: Signature


class Cancel(Struct, frozen=True, array_like=True, tag=12, forbid_unknown_fields=True):
    """Client: stop; I pay for what was delivered."""


class Abort(Struct, frozen=True, array_like=True, tag=13, forbid_unknown_fields=True):
    """Provider: the job cannot go on. Nothing beyond the last vouched receipt is owed."""

    code: Short
    reason: Reason


class Ping(Struct, frozen=True, array_like=True, tag=14, forbid_unknown_fields=True):
    """Either: are you there?"""

    number: Count


class Pong(Struct, frozen=True, array_like=True, tag=15, forbid_unknown_fields=True):
    """Either: I am."""

    number: Count


class Vectors(Struct, frozen=True, array_like=True, tag=16, forbid_unknown_fields=True):
    """Provider: sealed `VectorBatch`, the answer of an embedding job."""

    sealed: Chunk


class OffersAsk(Struct, frozen=True, array_like=True, tag=20, forbid_unknown_fields=True):
    """Anyone: the offers you know, from `after` on (page by provider address)."""

    after: Wallet


class OfferEnvelope(Struct, frozen=True, array_like=True, tag=21, forbid_unknown_fields=True):
    """A signed offer with the texts behind its hashes and the signed tariff it names."""

    offer: Packed  # Offer
    signature: Signature
    tariff: Packed  # Tariff
    tariff_signature: Signature
    peer_id: Short
    addresses: Annotated[tuple[Short, ...], Meta(max_length=8)]
    model: Short
    region: Short


class OffersEnd(Struct, frozen=True, array_like=True, tag=22, forbid_unknown_fields=True):
    """The page is over; `more` says whether another would follow."""

    more: bool


class CardAsk(Struct, frozen=True, array_like=True, tag=30, forbid_unknown_fields=True):
    """Client: the tokenizer and template of a profile."""

    profile_id: Hash


class CardHead(Struct, frozen=True, array_like=True, tag=31, forbid_unknown_fields=True):
    """Provider: the profile and small texts; `chunks` CardChunk frames with tokenizer.json follow."""

    model: Short
    profile: Packed  # Profile
    chat_template: Annotated[str, Meta(max_length=48 * 1024)]
    special: Annotated[dict[str, str], Meta(max_length=16)]
    eos_ids: Annotated[tuple[Count, ...], Meta(max_length=16)]
    max_context: Count
    chunks: Annotated[int, Meta(ge=1, le=1024)]


class CardChunk(Struct, frozen=True, array_like=True, tag=32, forbid_unknown_fields=True):
    """Provider: a piece of tokenizer.json."""

    data: Chunk


class AuditAsk(Struct, frozen=True, array_like=True, tag=40, forbid_unknown_fields=True):
    """Anyone: which jobs does this commitment hold? `commitment`: its key. `box_key`: for dossiers, if any follow."""

    commitment: Hash
    box_key: Hash


class AuditHead(Struct, frozen=True, array_like=True, tag=41, forbid_unknown_fields=True):
    """Provider: the commitment; `chunks` AuditEntries frames follow."""

    commitment: Packed  # Commitment
    signature: Signature
    chunks: Annotated[int, Meta(ge=1, le=4096)]


class AuditEntries(Struct, frozen=True, array_like=True, tag=42, forbid_unknown_fields=True):
    """Provider: a piece of the tree's entries, 76 bytes each (dossier.py)."""

    data: Chunk


class DossierAsk(Struct, frozen=True, array_like=True, tag=43, forbid_unknown_fields=True):
    """Validator of the case: the transcript of this drawn job."""

    job_id: Hash


class DossierChunk(Struct, frozen=True, array_like=True, tag=44, forbid_unknown_fields=True):
    """Provider: piece `index` of `count` of the dossier, sealed to the asker's box key."""

    index: Count
    count: Annotated[int, Meta(ge=1, le=1024)]
    sealed: Chunk


AuditFrame = AuditAsk | AuditHead | AuditEntries | DossierAsk | DossierChunk
JobFrame = (
    QuoteAsk
    | Quote
    | Request
    | PromptChunk
    | Accepted
    | Refuse
    | Tokens
    | Vectors
    | Receipt
    | VoucherFrame
    | End
    | Ack
    | Cancel
    | Abort
    | Ping
    | Pong
)
Frame = JobFrame | OffersAsk | OfferEnvelope | OffersEnd | CardAsk | CardHead | CardChunk | AuditFrame


class TokenBatch(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Inside Tokens: consecutive tokens of one leaf. `start`: index of the first among the job's output.

    `logprobs`: 2 bytes a token, `projections`: 16 bytes a token, `routing`: 8 bytes a token or none, as in the
    transcript's leaf. `alternatives`: for each token as many (id, 2-byte logprob) as the options asked for, or nothing.
    """

    start: Count
    token_ids: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=LEAF_TOKENS)]
    logprobs: Annotated[bytes, Meta(max_length=2 * LEAF_TOKENS)]
    projections: Annotated[bytes, Meta(max_length=16 * LEAF_TOKENS)]
    routing: Annotated[bytes, Meta(max_length=8 * LEAF_TOKENS)] = b""
    alternatives: Annotated[tuple[Alternatives, ...], Meta(max_length=LEAF_TOKENS)] = ()


class VectorBatch(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Inside Vectors: the vector of text `index`, fp32 little-endian."""

    index: Count
    vector: Annotated[bytes, Meta(min_length=4, max_length=CHUNK_BYTES)]


_encoder = msgspec.msgpack.Encoder()
_frame_decoder = msgspec.msgpack.Decoder(Frame)
_batch_decoder = msgspec.msgpack.Decoder(TokenBatch)
_vector_decoder = msgspec.msgpack.Decoder(VectorBatch)


def encode(frame: Frame) -> bytes:
    """Raises: FrameTooLarge when it does not fit (our own mistake; chunk the content)."""
    data = _encoder.encode(frame)
    if len(data) > MAX_FRAME_BYTES:
        raise FrameTooLarge(len(data), MAX_FRAME_BYTES)
    return data


def decode(data: bytes) -> Frame:
    """Raises: MalformedFrame."""
    # SPEC 3.2: a malformed frame costs the sender its stream
    try:
        frame: Frame = _frame_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, OverflowError, UnicodeDecodeError) as exc:
        raise MalformedFrame(str(exc)) from exc
    return frame


def encode_batch(batch: TokenBatch) -> bytes:
    """Plaintext of a Tokens frame."""
    return _encoder.encode(batch)


def decode_batch(data: bytes) -> TokenBatch:
    """Raises: MalformedFrame, also when the fingerprints do not match the number of tokens."""
    try:
        batch = _batch_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, OverflowError) as exc:
        raise MalformedFrame(str(exc)) from exc
    count = len(batch.token_ids)
    if (
        len(batch.logprobs) != 2 * count
        or len(batch.projections) != 16 * count
        or (len(batch.routing) not in (0, 8 * count))
    ):
        sizes = f"{len(batch.logprobs)}, {len(batch.projections)} and {len(batch.routing)}"
        raise MalformedFrame(f"{count} tokens with {sizes} bytes of evidence")
    if len(batch.alternatives) not in (0, count):
        raise MalformedFrame(f"{count} tokens with alternatives for {len(batch.alternatives)}")
    return batch


def encode_vector(batch: VectorBatch) -> bytes:
    """Plaintext of a Vectors frame."""
    return _encoder.encode(batch)


def decode_vector(data: bytes) -> VectorBatch:
    """Raises: MalformedFrame, also when the vector is no whole number of fp32 values."""
    try:
        batch = _vector_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, OverflowError) as exc:
        raise MalformedFrame(str(exc)) from exc
    if len(batch.vector) % 4:
        raise MalformedFrame(f"a vector of {len(batch.vector)} bytes is not made of fp32 values")
    return batch


def chunked(data: bytes) -> list[bytes]:
    """`data` in pieces of at most CHUNK_BYTES; at least one piece."""
    return [data[i : i + CHUNK_BYTES] for i in range(0, max(1, len(data)), CHUNK_BYTES)]
