"""What a job asks for beyond its fixed fields: stops, penalties, a grammar. Hashed into the JobRequest.

Options change which tokens are right, so whoever replays a transcript needs them exactly as they were signed: they
travel as bytes beside the request, and `options_hash` is over those bytes.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from protocol.errors import MalformedFrame
from protocol.units import Digest

MAX_GRAMMAR_BYTES: Final = 32 * 1024
"""Longest grammar or JSON Schema. Unit: bytes of UTF-8. Schemas of real tools stay below 8 KiB, and the frame that
carries one holds 64 KiB; doubling it doubles what a stranger can have us compile."""

MAX_OPTIONS_BYTES: Final = MAX_GRAMMAR_BYTES + 4096
"""Encoded options: the grammar, 64 stop ids, 32 input lengths."""

MAX_EMBED_INPUTS: Final = 32
"""Texts of one embedding job. Their vectors are delivered before the one receipt, so this is its increment."""

EMBED_INCREMENT_TOKENS: Final = 8_192
"""Tokens of an embedding job's texts together, unless it is a single one. Unit: tokens. All its vectors are out before
its one receipt is paid, so this is what a payer that vanishes costs; doubling it doubles that."""

MAX_ALTERNATIVES: Final = 20
"""Likeliest tokens reported beside the chosen one, as many as OpenAI's API sells."""

PENALTY_ONE: Final = 1_000
"""A penalty of 1.0. Unit: logits x 1000."""

_TAG: Final = b"tally/options/1"
_Count = Annotated[int, Meta(ge=0, lt=1 << 32)]
_Penalty = Annotated[int, Meta(ge=-2 * PENALTY_ONE, le=2 * PENALTY_ONE)]


class Syntax(IntEnum):
    """How `JobOptions.grammar` is written. JSON: any JSON object, without a text. LARK: llguidance's Lark dialect."""

    NONE = 0
    JSON = 1
    JSON_SCHEMA = 2
    LARK = 3


class JobOptions(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Options of one job; the defaults change nothing.

    `stop_ids` end the text after being emitted, as EOS does. Before `min_tokens` neither may be chosen. Penalties are
    in logits x 1000 and count output tokens. `continued`: how many tokens at the prompt's end are output of the job
    that this one continues: penalties, min_tokens and the grammar count them as output. `reasoning_open`: the prompt
    ends inside a reasoning block. `alternatives`: likeliest tokens to report per position.
    `inputs`: lengths of an embedding job's texts, which the prompt holds one after the other; `dimensions`: how much of
    each vector is wanted, 0 for all.
    """

    stop_ids: Annotated[tuple[_Count, ...], Meta(max_length=64)] = ()
    min_tokens: _Count = 0
    frequency_milli: _Penalty = 0
    presence_milli: _Penalty = 0
    syntax: Syntax = Syntax.NONE
    grammar: Annotated[str, Meta(max_length=MAX_GRAMMAR_BYTES)] = ""
    continued: _Count = 0
    reasoning_open: bool = False
    alternatives: Annotated[int, Meta(ge=0, le=MAX_ALTERNATIVES)] = 0
    inputs: Annotated[tuple[_Count, ...], Meta(max_length=MAX_EMBED_INPUTS)] = ()
    dimensions: _Count = 0

    @property
    def penalised(self) -> bool:
        """Whether the output so far moves the logits."""
        return bool(self.frequency_milli or self.presence_milli)


NO_OPTIONS: Final = JobOptions()

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(JobOptions)


def encode_options(options: JobOptions) -> bytes:
    """The bytes that travel and are hashed."""
    return _encoder.encode(options)


def decode_options(data: bytes) -> JobOptions:
    """Raises: MalformedFrame."""
    if len(data) > MAX_OPTIONS_BYTES:
        raise MalformedFrame(f"options of {len(data)} bytes, at most {MAX_OPTIONS_BYTES} are read")
    try:
        options = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, OverflowError, UnicodeDecodeError) as exc:
        raise MalformedFrame(str(exc)) from exc
    if len(options.grammar.encode()) > MAX_GRAMMAR_BYTES:
        raise MalformedFrame(f"a grammar of more than {MAX_GRAMMAR_BYTES} bytes")
    return options


def options_hash(encoded: bytes) -> Digest:
    """SHA-256(tag || encoded options): what the JobRequest signs."""
    return Digest(hashlib.sha256(_TAG + encoded).digest())


def penalty_milli(options: JobOptions, count: int) -> int:
    """What a token that the output holds `count` times loses, in logits x 1000. OpenAI's formula:

    frequency * count + presence * (count > 0). Source: OpenAI API reference, "Frequency and presence penalties".
    """
    return options.frequency_milli * count + (options.presence_milli if count else 0)
