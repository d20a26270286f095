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
from protocol.transcript import Leaf, Row, Transcript
from protocol.units import ZERO_DIGEST, JobId

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "transcript.json").read_text())
JOB = JobId(b"\x11" * 32)
RECORD = st.builds(
    Row,
    st.integers(0, (1 << 32) - 1),
    st.binary(min_size=2, max_size=2),
    st.binary(min_size=16, max_size=16),
    st.just(b""),
)
ROUTING = st.binary(min_size=8, max_size=8)
ROUTED = st.builds(lambda row, routing: row._replace(routing=routing), RECORD, ROUTING)
RECORDS = st.one_of(*(st.lists(record, min_size=1, max_size=32) for record in (RECORD, ROUTED)))


def leaf(count: int, first: int = 0, routing: bytes = b"") -> Leaf:
    return Leaf.of(Row(first + i, bytes([i, 1]), bytes([i] * 16), routing) for i in range(count))


def read_leaf(raw: bytes, width: int = 22) -> Leaf:
    """The leaf whose canonical bytes those are; `width`: bytes of a record."""
    parts = [raw[at : at + width] for at in range(0, len(raw), width)]
    return Leaf.of(Row(int.from_bytes(part[:4], "big"), part[4:6], part[6:22], part[22:]) for part in parts)


@pytest.mark.parametrize("case", VECTORS["chain"])
def test_chain_vectors(case: dict[str, Any]) -> None:
    chain = Transcript.start(JobId(bytes.fromhex(case["pre"]["job_id"])))
    for raw in case["pre"]["leaves"]:
        chain = chain.extend(read_leaf(bytes.fromhex(raw)))
    assert (chain.head.hex(), chain.leaves, chain.tokens) == tuple(case["post"].values())


@pytest.mark.parametrize("case", VECTORS["routed"])
def test_routed_chain_vectors(case: dict[str, Any]) -> None:
    chain = Transcript.start(JobId(bytes.fromhex(case["pre"]["job_id"])))
    for raw in case["pre"]["leaves"]:
        chain = chain.extend(read_leaf(bytes.fromhex(raw), 30))
    assert (chain.head.hex(), chain.leaves, chain.tokens, chain.routing.hex()) == tuple(case["post"].values())


@pytest.mark.parametrize("case", VECTORS["vectors"])
def test_embedding_chain_vectors(case: dict[str, Any]) -> None:
    chain = Transcript.start(JobId(bytes.fromhex(case["pre"]["job_id"])))
    for raw in case["pre"]["vectors"]:
        chain = chain.extend_vector(bytes.fromhex(raw))
    assert (chain.head.hex(), chain.leaves) == tuple(case["post"].values())


@pytest.mark.parametrize("case", VECTORS["routing_fingerprint"])
def test_routing_fingerprint_vectors(case: dict[str, Any]) -> None:
    assert transcript.routing_fingerprint(case["pre"]).hex() == case["post"]


@pytest.mark.parametrize("case", VECTORS["prompt_hash"])
def test_prompt_hash_vectors(case: dict[str, Any]) -> None:
    assert transcript.prompt_hash(bytes.fromhex(case["pre"]["salt"]), case["pre"]["token_ids"]).hex() == case["post"]


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


@given(RECORDS)
def test_leaf_bytes_are_its_records_in_order(records: list[Row]) -> None:
    made, width = Leaf.of(records), 30 if records[0].routing else 22
    assert len(made.to_bytes()) == width * len(records)
    assert read_leaf(made.to_bytes(), width) == made
    assert made.records() == records


@given(RECORDS, st.integers(0, 31), st.integers(0, 29))
def test_any_changed_byte_changes_the_head(records: list[Row], which: int, at: int) -> None:
    width = 30 if records[0].routing else 22
    raw = bytearray(Leaf.of(records).to_bytes())
    raw[width * (which % len(records)) + at % width] ^= 1
    start = Transcript.start(JOB)
    assert start.extend(read_leaf(bytes(raw), width)).head != start.extend(Leaf.of(records)).head


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
        Leaf.of([Row(1, logprobs, projections + b"\0" * 20)])


@pytest.mark.parametrize("count", [0, 33])
def test_a_leaf_holds_1_to_32_tokens(count: int) -> None:
    with pytest.raises(FieldOutOfRange):
        Leaf.of([Row(1, b"\0\0", bytes(16))] * count)


def test_hashes_refuse_what_does_not_fit() -> None:
    with pytest.raises(FieldOutOfRange):
        transcript.prompt_hash(b"short", [1])
    with pytest.raises(FieldOutOfRange):
        transcript.prompt_hash(b"\0" * 32, [-1])
    with pytest.raises(FieldOutOfRange):
        Transcript.start(JobId(b""))


def test_projection_of_another_seed_differs_and_keeps_scale() -> None:
    hidden = [math.sin(i) for i in range(256)]
    a, b = (transcript.unpack_fp16(transcript.project(bytes([s] * 32), hidden)) for s in (1, 2))
    assert a != b
    assert all(abs(x) < 5 for x in a + b)  # entries are ~ N(0, mean square of the state = 0.5)


def test_fp16_is_held_at_its_ends() -> None:
    assert transcript.unpack_fp16(transcript.pack_fp16([1e9, -1e9, math.nan, 0.5])) == (65504, -65504, 65504, 0.5)


# -------------------------------------------------------------------------------------------------------------- routing


def test_a_leaf_with_experts_for_some_tokens_only_is_refused() -> None:
    rows = [Row(1, b"\0\0", bytes(16), bytes(8)), Row(2, b"\0\0", bytes(16))]
    with pytest.raises(FieldOutOfRange) as caught:
        Leaf.of(rows)
    assert caught.value.field == "routing"


@pytest.mark.parametrize("size", [1, 7, 8, 15, 17, 24])
def test_routing_is_8_bytes_a_token(size: int) -> None:
    with pytest.raises(FieldOutOfRange) as caught:
        Leaf((1, 2), bytes(4), bytes(32), bytes(size))
    assert caught.value.field == "routing"


@given(st.lists(st.lists(ROUTING, min_size=1, max_size=32), min_size=1, max_size=4))
def test_the_routing_root_chains_the_experts_of_all_leaves(leaves: list[list[bytes]]) -> None:
    chain, expected = Transcript.start(JOB), bytes(32)
    for number, routings in enumerate(leaves):
        full = routings if number == len(leaves) - 1 else (routings * 32)[:32]
        chain = chain.extend(Leaf.of(Row(number, b"\0\0", bytes(16), routing) for routing in full))
        expected = hashlib.sha256(b"tally/transcript/routing/1" + expected + b"".join(full)).digest()
    assert chain.routing == expected


def test_a_dense_model_has_no_routing_root() -> None:
    assert Transcript.start(JOB).extend(leaf(32)).extend(leaf(3)).routing == ZERO_DIGEST


def test_other_experts_change_both_heads() -> None:
    a, b = (Transcript.start(JOB).extend(leaf(3, routing=bytes([n]) * 8)) for n in (1, 2))
    assert a.routing != b.routing and a.head != b.head


@given(st.lists(st.integers(0, (1 << 16) - 1), max_size=64))
def test_a_routing_fingerprint_is_the_start_of_a_digest(experts: list[int]) -> None:
    raw = b"".join(expert.to_bytes(2, "big") for expert in experts)
    assert transcript.routing_fingerprint(experts) == hashlib.sha256(raw).digest()[:8]


# -------------------------------------------------------------------------------------------------------------- vectors


@given(st.lists(st.binary(min_size=4, max_size=64), max_size=5))
def test_each_vector_is_a_leaf(vectors: list[bytes]) -> None:
    chain = Transcript.start(JOB)
    head = hashlib.sha256(b"tally/transcript/start/1" + JOB).digest()
    for vector in vectors:
        chain = chain.extend_vector(vector)
        digest = hashlib.sha256(b"tally/transcript/vector/1" + vector).digest()
        head = hashlib.sha256(b"tally/transcript/head/1" + head + digest).digest()
    assert (chain.head, chain.leaves, chain.tokens, chain.routing) == (head, len(vectors), 0, ZERO_DIGEST)
