"""The transcript of a stream: leaves of tokens with their fingerprints, chained by hash; and the hashes a job binds.

Provider and client run the same `Transcript` over the same leaves, so the head a receipt signs is recomputed, never
believed. Everything is big-endian. A record is 22 bytes: token id (u32), log-probability (fp16 bits), projection
(8 x fp16 bits), and in a mixture of experts 8 more for the experts chosen; a leaf is 1 to 32 records in order and only
the last leaf of a transcript may hold fewer than 32. In an embedding job each vector is a leaf.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from protocol.errors import FieldOutOfRange, MalformedFrame
from protocol.sampling import mix, stream_keys
from protocol.units import LEAF_TOKENS, ZERO_DIGEST, Digest, JobId

LOGPROB_BYTES: Final = 2
PROJECTION_ROWS: Final = 8
"""Numbers a hidden state is projected to. 8 fp16 values tell an int8 copy of a model from the real one; doubling it
adds 16 bytes to every token sent and stored."""

PROJECTION_BYTES: Final = 2 * PROJECTION_ROWS
ROUTING_BYTES: Final = 8
"""What fingerprints the experts chosen for a token: the start of SHA-256 over their ids. 8 bytes make a chance match
one in 2^64; a full digest would double a record to prove no more."""

RECORD_BYTES: Final = 4 + LOGPROB_BYTES + PROJECTION_BYTES

_TAG_START: Final = b"tally/transcript/start/1"
_TAG_LEAF: Final = b"tally/transcript/leaf/1"
_TAG_HEAD: Final = b"tally/transcript/head/1"
_TAG_VECTOR: Final = b"tally/transcript/vector/1"
_TAG_ROUTING: Final = b"tally/transcript/routing/1"
_TAG_PROJECTION: Final = b"tally/projection/1"
_FP16_MAX: Final = 65504.0


class Row(NamedTuple):
    """One token as it is recorded. `routing`: b"" in a dense model."""

    token_id: int
    logprob: bytes
    projection: bytes
    routing: bytes = b""


@dataclass(frozen=True, slots=True)
class Leaf:
    """1 to 32 consecutive tokens. `logprobs`: 2 bytes a token; `projections`: 16 bytes a token, both as emitted;
    `routing`: 8 bytes a token, or b"" for a dense model.

    Raises: FieldOutOfRange when a length or a token id (u32) does not fit.
    """

    token_ids: tuple[int, ...]
    logprobs: bytes
    projections: bytes
    routing: bytes = b""

    def __post_init__(self) -> None:
        count = len(self.token_ids)
        if not 1 <= count <= LEAF_TOKENS:
            raise FieldOutOfRange("Leaf", "token_ids", count)
        if len(self.logprobs) != LOGPROB_BYTES * count:
            raise FieldOutOfRange("Leaf", "logprobs", len(self.logprobs))
        if len(self.projections) != PROJECTION_BYTES * count:
            raise FieldOutOfRange("Leaf", "projections", len(self.projections))
        if len(self.routing) not in (0, ROUTING_BYTES * count):
            raise FieldOutOfRange("Leaf", "routing", len(self.routing))
        for token_id in self.token_ids:
            if type(token_id) is not int or not 0 <= token_id < 1 << 32:
                raise FieldOutOfRange("Leaf", "token_ids", token_id)

    @classmethod
    def of(cls, records: Iterable[Row]) -> Leaf:
        """From rows. Raises: FieldOutOfRange."""
        rows = list(records)
        widths = (("logprobs", 1, LOGPROB_BYTES), ("projections", 2, PROJECTION_BYTES))
        for name, at, width in widths:
            for row in rows:
                if len(row[at]) != width:  # type: ignore[arg-type]
                    raise FieldOutOfRange("Leaf", name, row[at])
        if len({len(row.routing) for row in rows}) > 1:
            raise FieldOutOfRange("Leaf", "routing", "some tokens with, some without")
        return cls(
            tuple(row.token_id for row in rows),
            b"".join(row.logprob for row in rows),
            b"".join(row.projection for row in rows),
            b"".join(row.routing for row in rows),
        )

    def records(self) -> list[Row]:
        """Each token's row, in order."""
        wide = ROUTING_BYTES if self.routing else 0
        return [
            Row(
                token_id,
                self.logprobs[LOGPROB_BYTES * i : LOGPROB_BYTES * (i + 1)],
                self.projections[PROJECTION_BYTES * i : PROJECTION_BYTES * (i + 1)],
                self.routing[wide * i : wide * (i + 1)],
            )
            for i, token_id in enumerate(self.token_ids)
        ]

    def to_bytes(self) -> bytes:
        """Canonical bytes: 22 per token, 30 in a mixture of experts."""
        return b"".join(struct.pack(">I", row.token_id) + b"".join(row[1:]) for row in self.records())

    def hash(self) -> Digest:
        """SHA-256(tag || canonical bytes)."""
        return Digest(hashlib.sha256(_TAG_LEAF + self.to_bytes()).digest())


@dataclass(frozen=True, slots=True)
class Transcript:
    """The chain so far. `head` is what a receipt signs as `leaves_root`, `routing` as `routing_root`.

    `closed`: a short leaf has ended it. `routing` stays zero in a dense model.
    """

    head: Digest
    leaves: int = 0
    tokens: int = 0
    closed: bool = False
    routing: Digest = ZERO_DIGEST

    @classmethod
    def start(cls, job_id: JobId) -> Transcript:
        """The empty transcript of one job: head_0 = SHA-256(tag || job id)."""
        if len(job_id) != 32:
            raise FieldOutOfRange("Transcript", "job_id", job_id)
        return cls(Digest(hashlib.sha256(_TAG_START + job_id).digest()))

    def extend(self, leaf: Leaf) -> Transcript:
        """With one more leaf: head_{k+1} = SHA-256(tag || head_k || leaf hash), and the same over its routing bytes.

        Raises: MalformedFrame when an earlier leaf was short: only the last may be.
        """
        if self.closed:
            raise MalformedFrame(f"leaf {self.leaves} follows a leaf of fewer than {LEAF_TOKENS} tokens")
        count = len(leaf.token_ids)
        routing = self.routing
        if leaf.routing:
            routing = Digest(hashlib.sha256(_TAG_ROUTING + routing + leaf.routing).digest())
        return replace(
            self,
            head=self._head(leaf.hash()),
            leaves=self.leaves + 1,
            tokens=self.tokens + count,
            closed=count < LEAF_TOKENS,
            routing=routing,
        )

    def extend_vector(self, vector: bytes) -> Transcript:
        """With one more embedding, whose leaf hash is SHA-256(tag || bytes as delivered)."""
        leaf = Digest(hashlib.sha256(_TAG_VECTOR + vector).digest())
        return replace(self, head=self._head(leaf), leaves=self.leaves + 1)

    def _head(self, leaf_hash: Digest) -> Digest:
        return Digest(hashlib.sha256(_TAG_HEAD + self.head + leaf_hash).digest())


def routing_fingerprint(experts: Sequence[int]) -> bytes:
    """8 bytes over one token's experts: ids as u16, ascending within a layer, layer after layer."""
    return hashlib.sha256(struct.pack(f">{len(experts)}H", *experts)).digest()[:ROUTING_BYTES]


def prompt_hash(salt: bytes, token_ids: Sequence[int]) -> Digest:
    """SHA-256(salt || token ids as u32). `salt`: 32 secret bytes, lest a short prompt be guessed.

    Raises: FieldOutOfRange.
    """
    if len(salt) != 32:
        raise FieldOutOfRange("JobRequest", "prompt_hash.salt", len(salt))
    return Digest(hashlib.sha256(salt + _words("prompt_hash", token_ids)).digest())


def _words(field: str, token_ids: Sequence[int]) -> bytes:
    try:
        return struct.pack(f">{len(token_ids)}I", *token_ids)
    except struct.error as exc:
        raise FieldOutOfRange("JobRequest", field, tuple(token_ids[:8])) from exc


# ------------------------------------------------------------------------------------------------------ fingerprints


def projection_keys(seed: bytes) -> tuple[int, int]:
    """The two words that key a seed's projection matrix. `seed`: 32 bytes."""
    return stream_keys(_TAG_PROJECTION, seed)


def projection_matrix(seed: bytes, hidden: int) -> list[list[int]]:
    """The 8 x `hidden` matrix of +1 and -1: entry (r, j) is +1 when bit r of the generator's word for j is set.

    Random signs keep inner products in expectation. Source: Achlioptas, Database-friendly random projections (2003).
    """
    keys = projection_keys(seed)
    words = [mix(keys, column) for column in range(hidden)]
    return [[1 if word >> row & 1 else -1 for word in words] for row in range(PROJECTION_ROWS)]


def project(seed: bytes, hidden_state: Sequence[float]) -> bytes:
    """16 bytes: the matrix times the hidden state the head reads (after the final norm), over sqrt(hidden), as fp16.

    Reference; an engine sums in fp32 in any order, so values agree within a few fp16 steps, not bit for bit.
    """
    scale = 1 / math.sqrt(len(hidden_state))
    rows = projection_matrix(seed, len(hidden_state))
    return pack_fp16([scale * math.fsum(sign * x for sign, x in zip(row, hidden_state, strict=True)) for row in rows])


def pack_fp16(values: Sequence[float]) -> bytes:
    """IEEE fp16 bits, big-endian, rounded to nearest even; held within +-65504, and NaN becomes +65504."""
    held = (max(-_FP16_MAX, value) if value <= _FP16_MAX else _FP16_MAX for value in values)
    return struct.pack(f">{len(values)}e", *held)


def unpack_fp16(raw: bytes) -> tuple[float, ...]:
    """The inverse of `pack_fp16`."""
    return struct.unpack(f">{len(raw) // 2}e", raw)
