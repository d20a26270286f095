"""Options: what is signed is what is read back, bounded in every field, and penalties are OpenAI's formula."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MalformedFrame
from protocol.options import (
    MAX_ALTERNATIVES,
    MAX_EMBED_INPUTS,
    MAX_GRAMMAR_BYTES,
    MAX_OPTIONS_BYTES,
    NO_OPTIONS,
    PENALTY_ONE,
    JobOptions,
    Syntax,
    decode_options,
    encode_options,
    options_hash,
    penalty_milli,
)
from protocol.sampling import adjusted

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "options.json").read_text())
U32 = (1 << 32) - 1
counts = st.integers(0, U32)
penalties = st.integers(-2 * PENALTY_ONE, 2 * PENALTY_ONE)
any_options = st.builds(
    JobOptions,
    stop_ids=st.lists(counts, max_size=64).map(tuple),
    min_tokens=counts,
    frequency_milli=penalties,
    presence_milli=penalties,
    syntax=st.sampled_from(Syntax),
    grammar=st.text(max_size=300),
    continued=counts,
    reasoning_open=st.booleans(),
    alternatives=st.integers(0, MAX_ALTERNATIVES),
    inputs=st.lists(counts, max_size=MAX_EMBED_INPUTS).map(tuple),
    dimensions=counts,
)


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["name"])
def test_option_vectors(case: dict[str, Any]) -> None:
    """The bytes are written down by the msgpack specification, not by the encoder."""
    raw = bytes.fromhex(case["post"]["encoded"])
    options = msgspec.convert(case["pre"], OptionsByName)
    assert encode_options(options.plain()) == raw
    assert decode_options(raw) == options.plain()
    assert options_hash(raw).hex() == case["post"]["hash"]


class OptionsByName(msgspec.Struct):
    """The vectors' readable form: fields by name, absent ones at their defaults."""

    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    frequency_milli: int = 0
    presence_milli: int = 0
    syntax: Syntax = Syntax.NONE
    grammar: str = ""
    continued: int = 0
    reasoning_open: bool = False
    alternatives: int = 0
    inputs: tuple[int, ...] = ()
    dimensions: int = 0

    def plain(self) -> JobOptions:
        return JobOptions(*(getattr(self, name) for name in JobOptions.__struct_fields__))


@given(any_options)
def test_options_round_trip(options: JobOptions) -> None:
    raw = encode_options(options)
    assert decode_options(raw) == options
    assert options_hash(raw) == hashlib.sha256(b"tally/options/1" + raw).digest()


@given(any_options, any_options)
def test_other_options_have_another_hash(one: JobOptions, other: JobOptions) -> None:
    hashes = {options_hash(encode_options(options)) for options in (one, other)}
    assert len(hashes) == (1 if one == other else 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_ids": (0,) * 65},
        {"stop_ids": (-1,)},
        {"stop_ids": (U32 + 1,)},
        {"stop_ids": ("2",)},
        {"min_tokens": -1},
        {"min_tokens": U32 + 1},
        {"min_tokens": 1.5},
        {"min_tokens": None},
        {"frequency_milli": 2 * PENALTY_ONE + 1},
        {"frequency_milli": -2 * PENALTY_ONE - 1},
        {"presence_milli": 2 * PENALTY_ONE + 1},
        {"presence_milli": -2 * PENALTY_ONE - 1},
        {"syntax": 4},
        {"syntax": -1},
        {"grammar": "x" * (MAX_GRAMMAR_BYTES + 1)},
        {"grammar": "ü" * (MAX_GRAMMAR_BYTES // 2 + 1)},  # few enough characters, too many bytes
        {"grammar": b"{}"},
        {"continued": U32 + 1},
        {"reasoning_open": 1},
        {"alternatives": MAX_ALTERNATIVES + 1},
        {"alternatives": -1},
        {"inputs": (1,) * (MAX_EMBED_INPUTS + 1)},
        {"inputs": (-1,)},
        {"dimensions": -1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_value_out_of_bounds_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedFrame):
        decode_options(encode_options(JobOptions(**changes)))


def test_the_largest_options_fit_their_bound() -> None:
    largest = JobOptions(
        (U32,) * 64,
        U32,
        -2 * PENALTY_ONE,
        -2 * PENALTY_ONE,
        Syntax.LARK,
        "x" * MAX_GRAMMAR_BYTES,
        U32,
        True,
        MAX_ALTERNATIVES,
        (U32,) * MAX_EMBED_INPUTS,
        U32,
    )
    raw = encode_options(largest)
    assert len(raw) <= MAX_OPTIONS_BYTES and decode_options(raw) == largest


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc0",
        b"\x80",
        b"\x9c" + encode_options(NO_OPTIONS)[1:] + b"\0",  # a surplus element
        encode_options(NO_OPTIONS) + b"\0",
        encode_options(NO_OPTIONS)[:-1],
        b"\x91" * 100_000,
        bytes(MAX_OPTIONS_BYTES + 1),
        encode_options(JobOptions(grammar="aaaa")).replace(b"aaaa", b"\xff\xfe\xff\xfe"),  # no UTF-8
    ],
    ids=lambda raw: raw[:8].hex(),
)
def test_what_is_no_options_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedFrame):
        decode_options(raw)


@given(st.one_of(st.binary(max_size=200), any_options.map(encode_options)), st.data())
def test_any_bytes_are_options_or_malformed(raw: bytes, data: st.DataObject) -> None:
    bent = bytearray(raw)
    if bent:
        bent[data.draw(st.integers(0, len(bent) - 1))] ^= data.draw(st.integers(0, 255))
    try:
        options = decode_options(bytes(bent))
    except MalformedFrame:
        return
    assert decode_options(encode_options(options)) == options


# ------------------------------------------------------------------------------------------------------------ penalties

logits = st.dictionaries(st.integers(0, 20), st.integers(-400, 400).map(lambda n: n / 8), min_size=1, max_size=12)


@given(any_options, st.integers(0, 10_000))
def test_a_penalty_is_frequency_by_count_and_presence_once(options: JobOptions, count: int) -> None:
    frequency, presence = Fraction(options.frequency_milli, 1000), Fraction(options.presence_milli, 1000)
    assert Fraction(penalty_milli(options, count), 1000) == count * frequency + (presence if count > 0 else 0)
    assert options.penalised == any(penalty_milli(options, n) for n in (1, 2))


@given(logits, any_options, st.data())
def test_adjusted_logits_are_the_definition(row: dict[int, float], options: JobOptions, data: st.DataObject) -> None:
    output = data.draw(st.lists(st.integers(0, 20), max_size=60))
    seen = {token: output.count(token) for token in output}
    banned = data.draw(st.frozensets(st.integers(0, 20), max_size=5))
    after = adjusted(row, options, seen, banned)
    assert after.keys() == row.keys()
    for token, logit in row.items():
        if token in banned:
            assert after[token] == -math.inf
        elif token not in output:
            assert after[token] == logit
        else:
            exact = Fraction(logit) - Fraction(options.frequency_milli * output.count(token), 1000)
            assert math.isclose(after[token], exact - Fraction(options.presence_milli, 1000), abs_tol=1e-9)


def test_a_penalty_moves_the_choice_and_a_bonus_moves_it_back() -> None:
    row, seen = {1: 2.0, 2: 1.5}, {1: 3}

    def best(**options: int) -> int:
        after = adjusted(row, JobOptions(**options), seen, frozenset())
        return max(after, key=lambda token: after[token])

    assert best() == 1
    assert best(presence_milli=501) == 2 and best(presence_milli=499) == 1
    assert best(frequency_milli=167) == 2 and best(frequency_milli=166) == 1
    assert best(frequency_milli=-1_000, presence_milli=2_000) == 1


@given(logits, any_options)
def test_the_defaults_change_nothing(row: dict[int, float], options: JobOptions) -> None:
    assert not NO_OPTIONS.penalised
    assert adjusted(row, NO_OPTIONS, dict.fromkeys(row, 7), frozenset()) == row
    assert adjusted(row, options, {}, frozenset()) == row
