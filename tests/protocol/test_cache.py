"""Prefix-cache evidence: heads name prefixes and reveal nothing, and two receipts prove a broken promise to cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from protocol.cache import (
    BLOCK_TOKENS,
    block_digests,
    block_heads,
    cache_head,
    chain,
    hit_limit,
    prompt_head,
    underreported,
)
from protocol.errors import FieldOutOfRange
from protocol.messages import Tariff, WorkReceipt
from protocol.transcript import Row
from protocol.units import ZERO_DIGEST, Address, Digest, FinishReason, JobKind, Wei
from tests.protocol.jobs import REQUEST, SALT, START, Job
from tests.protocol.sheets import ON_SLOW_CPU, SHEET

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "cache.json").read_text())
token_ids = st.integers(0, (1 << 32) - 1)
prompts = st.lists(st.integers(0, 3), max_size=200)
salts = st.binary(min_size=32, max_size=32)


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: str(case["pre"]["prompt_tokens"]))
def test_cache_vectors(case: dict[str, Any]) -> None:
    pre, post = case["pre"], case["post"]
    salt, count = bytes.fromhex(pre["salt"]), pre["prompt_tokens"]
    ids = range(pre["first_token"], pre["first_token"] + count)
    assert [digest.hex() for digest in block_digests(salt, ids)] == post["digests"]
    assert [head.hex() for head in block_heads(salt, ids)] == post["heads"]
    assert hit_limit(count) == post["hit_limit"]


# ---------------------------------------------------------------------------------------------------------------- heads


@given(salts, st.lists(token_ids, max_size=130))
def test_heads_are_the_chain_over_the_blocks(salt: bytes, ids: list[int]) -> None:
    head = hashlib.sha256(b"tally/cache/start/1" + salt).digest()
    expected = [head]
    for at in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = b"".join(token.to_bytes(4, "big") for token in ids[at : at + BLOCK_TOKENS])
        digest = hashlib.sha256(b"tally/cache/block/1" + salt + block).digest()
        head = hashlib.sha256(b"tally/cache/head/1" + head + digest).digest()
        expected.append(head)
    assert list(block_heads(salt, ids)) == expected


@given(salts, prompts, prompts)
def test_equal_heads_mean_equal_prefixes(salt: bytes, one: list[int], other: list[int]) -> None:
    for k, (a, b) in enumerate(zip(block_heads(salt, one), block_heads(salt, other), strict=False)):
        assert (a == b) == (one[: k * BLOCK_TOKENS] == other[: k * BLOCK_TOKENS])


@given(salts, salts, prompts)
def test_another_salt_gives_other_heads(salt: bytes, other: bytes, ids: list[int]) -> None:
    assume(salt != other)
    assert not set(block_heads(salt, ids)) & set(block_heads(other, ids))
    assert not set(block_digests(salt, ids)) & set(block_digests(other, ids))


@given(salts, prompts, st.integers(0, 6))
def test_digests_lead_from_any_head_to_every_later_one(salt: bytes, ids: list[int], start: int) -> None:
    heads, digests = block_heads(salt, ids), block_digests(salt, ids)
    at = min(start, len(digests))
    assert chain(heads[at], digests[at:]) == heads[at:]


def test_a_block_s_place_is_bound() -> None:
    """Two equal blocks have one digest and two heads, so a digest found elsewhere proves no prefix."""
    heads, digests = block_heads(SALT, [7] * 64), block_digests(SALT, [7] * 64)
    assert digests[0] == digests[1] and len(set(heads)) == 3


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_salt_has_32_bytes(size: int) -> None:
    for function in (block_digests, block_heads):
        with pytest.raises(FieldOutOfRange):
            function(bytes(size), range(64))


@given(st.integers(0, 1 << 20))
def test_the_limit_is_whole_blocks_that_leave_a_token(count: int) -> None:
    limit = hit_limit(count)
    assert limit % BLOCK_TOKENS == 0 and (limit < count or limit == count == 0)
    assert limit + BLOCK_TOKENS >= count, "no further block would fit"


@pytest.mark.parametrize(("count", "limit"), [(0, 0), (1, 0), (32, 0), (33, 32), (64, 32), (65, 64)])
def test_the_limit_at_its_edges(count: int, limit: int) -> None:
    assert hit_limit(count) == limit


@given(salts, st.lists(token_ids, max_size=130))
def test_a_hit_names_the_head_of_its_blocks(salt: bytes, ids: list[int]) -> None:
    heads = block_heads(salt, ids)
    assert cache_head(heads, 0) == ZERO_DIGEST
    for blocks in range(1, len(heads)):
        assert cache_head(heads, blocks * BLOCK_TOKENS) == heads[blocks]
    assert prompt_head(heads) == (heads[-1] if len(ids) >= BLOCK_TOKENS else ZERO_DIGEST)


@pytest.mark.parametrize("cached", [1, 31, 33, 63, 96, 128, 1 << 20, -32, -1])
def test_a_hit_that_is_no_block_of_the_prompt_is_refused(cached: int) -> None:
    with pytest.raises(FieldOutOfRange):
        cache_head(block_heads(SALT, range(70)), cached)


@pytest.mark.parametrize("cached", [32, 64])
def test_without_a_salt_nothing_is_hit_or_named(cached: int) -> None:
    assert cache_head((), 0) == prompt_head(()) == ZERO_DIGEST
    with pytest.raises(FieldOutOfRange):
        cache_head((), cached)


# ------------------------------------------------------------------------------------------------------ broken promises


@dataclass(frozen=True)
class Case:
    """Two jobs of one payer, the second's prompt beginning with the first's, and what the second was charged for."""

    kept: WorkReceipt
    later: WorkReceipt
    between: tuple[Digest, ...]
    tariff: Tariff = SHEET

    def found(self) -> int:
        return underreported(self.kept, self.later, self.tariff, self.between)


def receipt_of(prompt: list[int], salt: bytes = SALT, nonce: int = 1, **changes: Any) -> WorkReceipt:
    """A final receipt of a job of one token with that prompt, as the work account makes it."""
    request = replace(REQUEST, prompt_tokens=len(prompt), client_nonce=Digest(bytes([nonce]) * 32))
    work = Job(request, SHEET, 0, (), FinishReason.CANCELLED, 0, Wei(0)).begin()
    work = replace(work, heads=block_heads(salt, prompt)).take((Row(1, b"\0\0", bytes(16)),), START)
    _, receipt = work.receipt(FinishReason.CANCELLED, START, Wei(0))
    return replace(receipt, **changes)


def case(first: list[int], second: list[int], cached: int = 0, gap_ms: int = 1_000) -> Case:
    """The later job comes in `gap_ms` after the first has ended, 2 s after it began."""
    kept = receipt_of(first, is_kept=True, finished_at=START + 2_000)
    later = receipt_of(second, nonce=2, received_at=START + 2_000 + gap_ms, cached_tokens=cached)
    return Case(kept, later, block_digests(SALT, second)[len(first) // BLOCK_TOKENS :])


FIRST = list(range(100))
SECOND = [*FIRST, *range(500, 600)]
BROKEN = case(FIRST, SECOND)
"""100 tokens kept, 3 blocks of them; 200 sent a second later, none of them cached."""


@ON_SLOW_CPU
@given(
    st.lists(st.integers(0, 9), min_size=BLOCK_TOKENS, max_size=150),
    st.lists(st.integers(0, 9), max_size=150),
    st.data(),
)
def test_the_proof_gives_the_tokens_that_were_due(first: list[int], more: list[int], data: st.DataObject) -> None:
    whole = first[: len(first) // BLOCK_TOKENS * BLOCK_TOKENS]
    second = whole + more
    due = min(len(whole), hit_limit(len(second)))
    cached = data.draw(st.integers(0, hit_limit(len(second)) // BLOCK_TOKENS)) * BLOCK_TOKENS
    assert case(first, second, cached).found() == max(0, due - cached)


def test_a_prompt_sent_again_is_due_but_for_its_last_block() -> None:
    assert case(FIRST[:96], FIRST[:96]).found() == 64
    assert case(FIRST[:97], FIRST[:97]).found() == 96
    assert case(FIRST[:32], FIRST[:32]).found() == 0


@pytest.mark.parametrize(("cached", "short"), [(0, 96), (32, 64), (64, 32), (96, 0), (128, 0), (192, 0)])
def test_only_what_is_missing_is_due(cached: int, short: int) -> None:
    assert case(FIRST, SECOND, cached).found() == short


@pytest.mark.parametrize(
    ("gap_ms", "due"), [(-1, 0), (0, 96), (SHEET.cache_ttl_s * 1000, 96), (SHEET.cache_ttl_s * 1000 + 1, 0)]
)
def test_the_promise_holds_from_the_end_for_as_long_as_the_tariff_says(gap_ms: int, due: int) -> None:
    assert case(FIRST, SECOND, gap_ms=gap_ms).found() == due


def test_a_tariff_without_a_promise_breaks_none() -> None:
    assert replace(BROKEN, tariff=replace(SHEET, cache_ttl_s=0)).found() == 0


OTHERS: dict[str, Any] = {
    "provider": Address(b"\x77" * 20),
    "client": Address(b"\x77" * 20),
    "tariff_hash": Digest(b"\x77" * 32),
}


@pytest.mark.parametrize("side", ["kept", "later"])
@pytest.mark.parametrize("field", list(OTHERS))
def test_receipts_of_others_prove_nothing(side: str, field: str) -> None:
    assert BROKEN.found() == 96
    bent = replace(getattr(BROKEN, side), **{field: OTHERS[field]})
    assert replace(BROKEN, **{side: bent}).found() == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"is_kept": False},
        {"is_final": False},
        {"prompt_head": ZERO_DIGEST},
        {"prompt_head": Digest(b"\x77" * 32)},
        {"finished_at": START + 10_000},
        {"prompt_tokens": 31},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_first_receipt_that_promises_nothing_proves_nothing(changes: dict[str, Any]) -> None:
    assert replace(BROKEN, kept=replace(BROKEN.kept, **changes)).found() == 0


@pytest.mark.parametrize(
    "changes",
    [{"prompt_head": ZERO_DIGEST}, {"prompt_head": Digest(b"\x77" * 32)}, {"prompt_tokens": 32}, {"received_at": 0}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_later_receipt_of_another_prompt_proves_nothing(changes: dict[str, Any]) -> None:
    assert replace(BROKEN, later=replace(BROKEN.later, **changes)).found() == 0


@pytest.mark.parametrize(
    "between",
    [
        (),
        BROKEN.between[1:],
        BROKEN.between[:-1],
        BROKEN.between[::-1],
        (*BROKEN.between, BROKEN.between[-1]),
        (Digest(bytes(32)), *BROKEN.between[1:]),
        block_digests(SALT, SECOND),
        block_digests(b"\x25" * 32, SECOND)[3:],
    ],
    ids=str,
)
def test_digests_that_do_not_lead_there_prove_nothing(between: tuple[Digest, ...]) -> None:
    assert replace(BROKEN, between=between).found() == 0


def test_a_prompt_that_only_shares_a_part_proves_nothing() -> None:
    other = [*FIRST[:95], 9_999, *SECOND[96:]]
    assert case(FIRST, other).found() == 0


def test_another_salt_is_another_cache() -> None:
    """A payer that changes its salt asked for a fresh cache: the provider owes it no hit."""
    later = receipt_of(SECOND, b"\x25" * 32, nonce=2, received_at=START + 3_000)
    for salt in (SALT, b"\x25" * 32):
        assert Case(BROKEN.kept, later, block_digests(salt, SECOND)[3:]).found() == 0


def test_a_job_that_ended_before_its_first_token_had_nothing_looked_up() -> None:
    """The count is said with the first token; a client that cancels sooner has no grounds to complain."""
    assert replace(BROKEN, later=replace(BROKEN.later, completion_tokens=0)).found() == 0


def test_a_job_cannot_break_its_own_promise() -> None:
    """One that came and ended in the same millisecond keeps its prompt for the next, not for itself."""
    quick = replace(BROKEN.kept, received_at=START, finished_at=START)
    assert underreported(quick, quick, SHEET, ()) == 0


def test_an_embedding_job_names_no_prompt_and_so_owes_no_hit() -> None:
    """It is priced by texts read, so a hit is nothing it could have missed."""
    request = replace(REQUEST, kind=JobKind.EMBED, prompt_tokens=100, max_tokens=0)
    work = Job(request, SHEET, 0, (), FinishReason.CANCELLED, 0, Wei(0)).begin().hit(0, kept=True)
    _, receipt = work.receipt(FinishReason.CANCELLED, START + 3_000, Wei(0))
    assert (receipt.prompt_head, receipt.is_kept) == (ZERO_DIGEST, False)
