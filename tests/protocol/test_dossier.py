"""A dossier that is honest passes; one that was bent anywhere is forged, and says where."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.dossier import (
    ADMISSION_SLACK_S,
    ENTRY_BYTES,
    Examined,
    Forged,
    SealedDossiers,
    decode,
    encode,
    examine,
    pack_entries,
    read_leaf,
    unpack_entries,
)
from protocol.eip712 import fields_of
from protocol.errors import FieldOutOfRange, MalformedFrame
from protocol.frames import CHUNK_BYTES
from protocol.merkle import Entry
from protocol.messages import Accept, JobRequest, Tariff, WorkReceipt
from protocol.options import JobOptions
from protocol.sealing import BoxKey
from protocol.transcript import Leaf
from protocol.units import MAX_AMOUNT, Address, Digest, FinishReason, JobId, JobKind, Wei
from tests.protocol.dossiers import NODE, SESSION, Case, row, served, signed
from tests.protocol.jobs import DOMAIN, START
from tests.protocol.sheets import PROFILE

ROUTED = replace(PROFILE, moe_layers=2, experts=8, experts_chosen=2)


def check(case: Case, **changes: Any) -> Examined:
    arguments = {"domain": DOMAIN, "node_keys": (NODE.address,), "profile": case.profile, **changes}
    return examine(case.dossier, case.entry, **arguments)


def forged(case: Case, **changes: Any) -> str:
    with pytest.raises(Forged) as caught:
        check(case, **changes)
    assert caught.value.reason
    return caught.value.reason


# --------------------------------------------------------------------------------------------------------------- honest

EMBED = {
    "kind": JobKind.EMBED,
    "prompt": (1, 2, 3, 4, 5),
    "options": JobOptions(inputs=(2, 3)),
    "tokens": 0,
}
HONEST = {
    "three leaves": served(),
    "one token": served(1),
    "no token, cancelled": served(0, finish=FinishReason.CANCELLED),
    "a full leaf at the end": served(64, finish=FinishReason.CANCELLED),
    "all that was asked for": served(64, max_tokens=64, finish=FinishReason.LENGTH),
    "stopped at the last token": served(64, max_tokens=64),
    "never ended": served(64, open_ended=True),
    "a stop token": served(10, options=JobOptions(stop_ids=(109,))),
    "a deadline": served(10, finish=FinishReason.DEADLINE, deadline=START + 900),
    "a continuation": served(10, parent_job=Digest(b"\x41" * 32), parent_seed=Digest(b"\x42" * 32)),
    "a mixture of experts": served(40, profile=ROUTED),
    "private": served(40, is_private=True),
    "vectors": served(vectors=2, **EMBED),
    "one vector of two": served(vectors=1, finish=FinishReason.CANCELLED, **EMBED),
    "private vectors": served(vectors=2, is_private=True, **EMBED),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in HONEST.items()])
def test_an_honest_dossier_passes_also_after_its_way_through_bytes(case: Case) -> None:
    dossier = decode(encode(case.dossier))
    assert dossier == case.dossier
    found = check(Case(dossier, case.entry, case.profile), period=(START, START + 1))
    assert found.seed == case.dossier.accept.seed
    assert found.private == case.dossier.request.is_private
    if found.private:
        assert (found.rows, found.vectors) == ((), ())
    elif found.vectors:
        assert found.vectors == case.dossier.content
        assert found.inputs == ((1, 2), (3, 4, 5))[: len(found.vectors)]
    else:
        routed = bool(case.profile.moe_layers)
        assert found.rows == tuple(row(at, routed=routed) for at in range(case.dossier.receipt.completion_tokens))


@given(tokens=st.integers(0, 100), open_ended=st.booleans(), private=st.booleans())
def test_honest_jobs_of_any_length_pass(tokens: int, open_ended: bool, private: bool) -> None:
    if open_ended:
        tokens = tokens // 32 * 32
    if open_ended and not tokens:
        return
    finish = FinishReason.LENGTH if tokens == 100 else FinishReason.CANCELLED
    check(served(tokens, open_ended=open_ended, finish=finish, is_private=private))


# ---------------------------------------------------------------------------------------------------------------- bent


def other(value: Any, sol: str) -> Any:
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:]
    return not value if sol == "bool" else value + 1 if value < 1 << 31 else value - 1


SIGNED = [
    (part, name, sol)
    for part, kind in (("request", JobRequest), ("accept", Accept), ("tariff", Tariff), ("receipt", WorkReceipt))
    for name, sol in fields_of(kind)
]


@pytest.mark.parametrize(("part", "name", "sol"), SIGNED, ids=lambda value: str(value))
def test_no_field_of_a_signed_document_can_be_exchanged(part: str, name: str, sol: str) -> None:
    case = HONEST["three leaves"]
    document = getattr(case.dossier, part)
    bent = replace(document, **{name: other(getattr(document, name), sol)})
    forged(replace(case, dossier=replace(case.dossier, **{part: bent})))


FREE = {
    "cached_tokens": "whole blocks alone are checked",
    "cache_head": "named by the client's salt, which no auditor has",
    "prompt_head": "named by the client's salt, which no auditor has",
    "is_kept": "the provider's word",
    "first_token_at": "the provider's clock",
    "finished_at": "the provider's clock",
    "waited_ms": "the provider's clock",
    "vouched": "the highest voucher it held",
    "previous": "the digest of a receipt that is not shown",
}
"""What a provider states and no auditor can recompute."""


@pytest.mark.parametrize("name", [item.name for item in fields(WorkReceipt) if item.name not in FREE])
def test_no_receipt_is_believed_because_its_provider_signed_it(name: str) -> None:
    sol = dict(fields_of(WorkReceipt))[name]
    for case in (HONEST["three leaves"], HONEST["private"]):
        if case.dossier.request.is_private and name in ("leaves_root", "routing_root"):
            continue  # what it is over is not shown
        value = getattr(case.dossier.receipt, name)
        reason = forged(signed(case, **{name: other(value, sol)}))
        assert reason


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("request_signature", NODE.sign(DOMAIN, HONEST["three leaves"].dossier.request)),
        ("accept_signature", SESSION.sign(DOMAIN, HONEST["three leaves"].dossier.accept)),
        ("tariff_signature", SESSION.sign(DOMAIN, HONEST["three leaves"].dossier.tariff)),
        ("receipt_signature", SESSION.sign(DOMAIN, HONEST["three leaves"].dossier.receipt)),
        ("options", b"\x90"),
        ("salt", b"\x35" * 32),
        ("salt", b""),
        ("prompt", (5, 6, 7, 9)),
        ("prompt", (5, 6, 7)),
        ("prompt", ()),
        ("content", ()),
        ("content", HONEST["three leaves"].dossier.content[:2]),
        ("content", HONEST["three leaves"].dossier.content[::-1]),
        ("content", (*HONEST["three leaves"].dossier.content, b"")),
        ("content", (*HONEST["three leaves"].dossier.content[:2], b"short")),
        ("content", HONEST["three leaves"].dossier.content * 2),
    ],
)
def test_no_other_part_can_be_exchanged(name: str, value: Any) -> None:
    case = HONEST["three leaves"]
    forged(replace(case, dossier=replace(case.dossier, **{name: value})))


@given(leaf=st.integers(0, 2), at=st.integers(0, 22 * 6 - 1), bit=st.integers(0, 7))
def test_no_bit_of_a_transcript_can_be_flipped(leaf: int, at: int, bit: int) -> None:
    case = HONEST["three leaves"]
    content = list(case.dossier.content)
    raw = bytearray(content[leaf])
    raw[at] ^= 1 << bit
    content[leaf] = bytes(raw)
    assert "leaves_root" in forged(replace(case, dossier=replace(case.dossier, content=tuple(content))))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"job_id": JobId(b"\1" * 32)}, "the entry of job"),
        ({"receipt": Digest(b"\1" * 32)}, "the entry holds"),
        ({"amount": Wei(0)}, "the entry holds 0 wei"),
        ({"amount": Wei(MAX_AMOUNT)}, "the entry holds"),
    ],
)
def test_the_entry_is_the_receipt_s(entry: dict[str, Any], reason: str) -> None:
    case = HONEST["three leaves"]
    assert reason in forged(replace(case, entry=replace(case.entry, **entry)))


def test_the_audit_s_own_terms_count() -> None:
    case = HONEST["three leaves"]
    assert "profile" in forged(case, profile=replace(PROFILE, margin_milli=7))
    assert forged(case, node_keys=(Address(b"\x99" * 20),))
    assert "epoch" in forged(case, period=(START + 1, START + 2))
    assert "epoch" in forged(case, period=(START - 1, START))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (served(10, finish=FinishReason.ERROR), "no receipt for its failure"),
        (served(10, finish=FinishReason.LENGTH), "length after 10"),
        (served(100, finish=FinishReason.CANCELLED), "ended by cancelled"),
        (served(10, finish=FinishReason.DEADLINE), "had not come"),
        (served(10, options=JobOptions(stop_ids=(104,))), "follow a stop token"),
        (served(10, options=JobOptions(stop_ids=(109,)), finish=FinishReason.CANCELLED), "did not stop"),
        (served(10, options=JobOptions(reasoning_open=True)), "reasoning"),
        (served(10, parent_job=Digest(b"\x41" * 32)), "parent"),
        (served(10, price_ceiling=1), "ceiling"),
        (served(vectors=1, **EMBED), "stopped before its last text"),
        (served(vectors=2, finish=FinishReason.LENGTH, **EMBED), "by length"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_job_that_cannot_have_gone_so_is_forged(case: Case, reason: str) -> None:
    assert reason in forged(case)


def test_a_private_job_shows_nothing_of_its_content() -> None:
    case = HONEST["private"]
    shown = HONEST["three leaves"].dossier
    for name in ("salt", "prompt", "content"):
        assert "private" in forged(replace(case, dossier=replace(case.dossier, **{name: getattr(shown, name)})))


def test_a_job_accepted_just_after_its_tariff_s_end_convicts_nobody() -> None:
    case = served(10)
    tariff = case.dossier.tariff
    assert tariff.valid_until > START // 1000
    for late, honest in ((ADMISSION_SLACK_S - 1, True), (ADMISSION_SLACK_S, False)):
        accept = replace(case.dossier.accept, accepted_at=(tariff.valid_until + late) * 1000)
        moved = {"received_at": accept.accepted_at, "first_token_at": accept.accepted_at}
        later = signed(case, **moved, finished_at=accept.accepted_at)
        dossier = replace(later.dossier, accept=accept, accept_signature=NODE.sign(DOMAIN, accept))
        bent = replace(later, dossier=dossier)
        if honest:
            check(bent)
        else:
            assert "in force" in forged(bent)


@pytest.mark.parametrize("leaves", [HONEST["vectors"].dossier.content[:1], (b"",) * 2, (b"abc",) * 2])
def test_vectors_are_as_many_as_were_charged_and_made_of_numbers(leaves: tuple[bytes, ...]) -> None:
    case = HONEST["vectors"]
    forged(replace(case, dossier=replace(case.dossier, content=leaves)))


# --------------------------------------------------------------------------------------------------------------- bytes


@given(st.binary(max_size=300))
def test_bytes_that_are_no_dossier_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedFrame):
        decode(data)


@given(st.data())
def test_a_damaged_dossier_is_malformed_or_forged(data: st.DataObject) -> None:
    case = HONEST["one token"]
    raw = bytearray(encode(case.dossier))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        dossier = decode(bytes(raw))
    except MalformedFrame:
        return
    if dossier != case.dossier:
        forged(replace(case, dossier=dossier))


def test_a_token_id_that_is_no_u32_is_not_sent() -> None:
    with pytest.raises(FieldOutOfRange, match="prompt"):
        encode(replace(HONEST["one token"].dossier, prompt=(1 << 32,)))


entries = st.builds(
    Entry,
    st.binary(min_size=32, max_size=32).map(JobId),
    st.binary(min_size=32, max_size=32).map(Digest),
    st.integers(0, MAX_AMOUNT).map(Wei),
)


@given(st.lists(entries, max_size=20))
def test_entries_come_back(listed: list[Entry]) -> None:
    packed = pack_entries(listed)
    assert len(packed) == ENTRY_BYTES * len(listed)
    assert list(unpack_entries(packed)) == listed


def test_entries_that_are_cut_or_do_not_fit_are_refused() -> None:
    fine = Entry(JobId(b"\1" * 32), Digest(b"\2" * 32), Wei(3))
    with pytest.raises(MalformedFrame):
        unpack_entries(pack_entries([fine])[:-1])
    for wrong in (
        replace(fine, job_id=JobId(b"")),
        replace(fine, receipt=Digest(b"")),
        replace(fine, amount=Wei(1 << 96)),
    ):
        with pytest.raises(FieldOutOfRange):
            pack_entries([wrong])


@given(count=st.integers(1, 32), routed=st.booleans())
def test_a_leaf_is_read_back_from_its_bytes(count: int, routed: bool) -> None:
    leaf = Leaf.of(row(at, routed=routed) for at in range(count))
    assert read_leaf(leaf.to_bytes(), routed=routed) == leaf
    with pytest.raises(MalformedFrame):
        read_leaf(leaf.to_bytes() + b"x", routed=routed)


# --------------------------------------------------------------------------------------------------------------- sealed


def test_dossiers_reach_their_asker_and_nobody_else() -> None:
    asker, stranger = BoxKey.from_secret(b"\x51" * 32), BoxKey.from_secret(b"\x52" * 32)
    provider = SealedDossiers(BoxKey.from_secret(b"\x53" * 32), asker.public)
    large, small = bytes(2 * CHUNK_BYTES + 5), encode(HONEST["three leaves"].dossier)
    first, second = provider.seal(large), provider.seal(small)
    assert [(chunk.index, chunk.count) for chunk in first] == [(0, 3), (1, 3), (2, 3)]
    reader = SealedDossiers(asker, None)
    assert b"".join(reader.unseal(chunk) for chunk in first) == large
    assert b"".join(reader.unseal(chunk) for chunk in second) == small
    with pytest.raises(MalformedFrame):
        SealedDossiers(stranger, None).unseal(first[0])


def test_sealed_pieces_cannot_be_repeated_reordered_or_taken_over() -> None:
    asker = BoxKey.from_secret(b"\x51" * 32)
    provider = SealedDossiers(BoxKey.from_secret(b"\x53" * 32), asker.public)
    first, second = provider.seal(b"one")[0], provider.seal(b"two")[0]
    with pytest.raises(MalformedFrame):
        SealedDossiers(asker, None).unseal(second)
    reader = SealedDossiers(asker, None)
    reader.unseal(first)
    with pytest.raises(MalformedFrame):
        reader.unseal(first)
    intruder = SealedDossiers(BoxKey.from_secret(b"\x54" * 32), asker.public)
    with pytest.raises(MalformedFrame, match="changed its key"):
        reader.unseal(intruder.seal(b"three")[0])
