"""Leaves, the hash chain, the hashes a job binds, and the projection matrix."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import transcript
from protocol.errors import FieldOutOfRange, MalformedFrame
from protocol.transcript import Leaf, Transcript
from protocol.units import JobId

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "transcript.json").read_text())
JOB = JobId(b"\x11" * 32)
RECORD = st.tuples(
    st.integers(0, (1 << 32) - 1), st.binary(min_size=2, max_size=2), st.binary(min_size=16, max_size=16)
)


def leaf(count: int, first: int = 0) -> Leaf:
    return Leaf.of((first + i, bytes([i, 1]), bytes([i] * 16)) for i in range(count))


@pytest.mark.parametrize("case", VECTORS["chain"])
def test_chain_vectors(case: dict[str, Any]) -> None:
    chain = Transcript.start(JobId(bytes.fromhex(case["pre"]["job_id"])))
    for raw in case["pre"]["leaves"]:
        chain = chain.extend(Leaf.from_bytes(bytes.fromhex(raw)))
    assert (chain.head.hex(), chain.leaves, chain.tokens) == tuple(case["post"].values())


@pytest.mark.parametrize("case", VECTORS["prompt_hash"])
def test_prompt_hash_vectors(case: dict[str, Any]) -> None:
    assert transcript.prompt_hash(bytes.fromhex(case["pre"]["salt"]), case["pre"]["token_ids"]).hex() == case["post"]


@pytest.mark.parametrize("case", VECTORS["stop_hash"])
def test_stop_hash_vectors(case: dict[str, Any]) -> None:
    assert transcript.stop_hash(case["pre"]["stop_ids"], case["pre"]["stop_strings"]).hex() == case["post"]


@pytest.mark.parametrize("case", VECTORS["project"])
def test_projection_vectors(case: dict[str, Any]) -> None:
    seed = bytes.fromhex(case["pre"]["seed"])
    assert transcript.project(seed, case["pre"]["hidden_state"]).hex() == case["post"]["projection"]
    rows = transcript.projection_matrix(seed, len(case["pre"]["hidden_state"]))
    assert ["".join("+" if x > 0 else "-" for x in row) for row in rows] == case["post"]["matrix"]


def test_prompt_hash_is_what_the_job_request_documents() -> None:
    salt = b"\x07" * 32
    ids = [1, 2, 70_000]
    raw = salt + b"".join(i.to_bytes(4, "big") for i in ids)
    assert transcript.prompt_hash(salt, ids) == hashlib.sha256(raw).digest()


@given(st.lists(RECORD, min_size=1, max_size=32))
def test_leaf_bytes_round_trip(records: list[tuple[int, bytes, bytes]]) -> None:
    made = Leaf.of(records)
    assert len(made.to_bytes()) == 22 * len(records)
    assert Leaf.from_bytes(made.to_bytes()) == made
    assert made.records() == records


@given(st.lists(RECORD, min_size=2, max_size=8), st.integers(0, 7), st.integers(0, 21))
def test_any_changed_byte_changes_the_head(records: list[tuple[int, bytes, bytes]], which: int, at: int) -> None:
    raw = bytearray(Leaf.of(records).to_bytes())
    raw[22 * (which % len(records)) + at] ^= 1
    start = Transcript.start(JOB)
    assert start.extend(Leaf.from_bytes(bytes(raw))).head != start.extend(Leaf.of(records)).head


def test_order_and_job_are_bound() -> None:
    a, b = leaf(32), leaf(32, first=100)
    heads = {
        Transcript.start(JOB).extend(a).extend(b).head,
        Transcript.start(JOB).extend(b).extend(a).head,
        Transcript.start(JobId(b"\x12" * 32)).extend(a).extend(b).head,
    }
    assert len(heads) == 3


def test_only_the_last_leaf_may_be_short() -> None:
    ended = Transcript.start(JOB).extend(leaf(32)).extend(leaf(3))
    assert (ended.leaves, ended.tokens, ended.closed) == (2, 35, True)
    with pytest.raises(MalformedFrame):
        ended.extend(leaf(32))


@pytest.mark.parametrize("raw", [b"", b"\0" * 21, b"\0" * 22 * 33])
def test_leaf_of_wrong_length_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedFrame):
        Leaf.from_bytes(raw)


@pytest.mark.parametrize(
    ("ids", "logprobs", "projections"),
    [
        ((), b"", b""),
        ((1,), b"\0", b"\0" * 16),
        ((1,), b"\0\0", b"\0" * 15),
        ((1 << 32,), b"\0\0", b"\0" * 16),
        ((-1,), b"\0\0", b"\0" * 16),
    ],
)
def test_leaf_fields_out_of_range(ids: tuple[int, ...], logprobs: bytes, projections: bytes) -> None:
    with pytest.raises(FieldOutOfRange):
        Leaf(ids, logprobs, projections)
    with pytest.raises(FieldOutOfRange):
        Leaf.of([(1, logprobs, projections + b"\0" * 20)])


def test_hashes_refuse_what_does_not_fit() -> None:
    with pytest.raises(FieldOutOfRange):
        transcript.prompt_hash(b"short", [1])
    with pytest.raises(FieldOutOfRange):
        transcript.prompt_hash(b"\0" * 32, [-1])
    with pytest.raises(FieldOutOfRange):
        transcript.stop_hash([1 << 32], [])
    with pytest.raises(FieldOutOfRange):
        Transcript.start(JobId(b""))


def test_stop_hash_keeps_the_parts_apart() -> None:
    assert len({transcript.stop_hash([], x) for x in (["ab"], ["a", "b"], ["b", "a"], ["", "ab"], [])}) == 5


def test_projection_of_another_seed_differs_and_keeps_scale() -> None:
    hidden = [math.sin(i) for i in range(256)]
    a, b = (transcript.unpack_fp16(transcript.project(bytes([s] * 32), hidden)) for s in (1, 2))
    assert a != b
    assert all(abs(x) < 5 for x in a + b)  # entries are ~ N(0, mean square of the state = 0.5)


def test_fp16_is_held_at_its_ends() -> None:
    assert transcript.unpack_fp16(transcript.pack_fp16([1e9, -1e9, math.nan, 0.5])) == (65504, -65504, 65504, 0.5)
