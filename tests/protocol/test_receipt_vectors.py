"""Receipts written down: an account built from bytes takes or refuses them, and their numbers are worked out anew."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from protocol.cache import block_heads
from protocol.eip712 import Domain, digest
from protocol.errors import ReceiptMismatch
from protocol.messages import Accept, JobRequest, Profile, Tariff, WorkReceipt
from protocol.metering import Usage
from protocol.options import decode_options
from protocol.packing import unpack
from protocol.tariff import basis_of
from protocol.units import Address, FinishReason, JobId, JobKind, Wei
from protocol.work import Work, check_receipt
from tests.protocol.receipt_vectors import PATH, row_of, text
from tests.protocol.sheets import exact_metered

VECTORS = json.loads(PATH.read_text())
SOUND = [case for case in VECTORS if "post" in case]


def named(case: dict[str, Any]) -> str:
    return str(case["name"])


def width(pre: dict[str, Any]) -> int:
    """Bytes of a record: 30 in a mixture of experts."""
    return 30 if unpack(Profile, bytes.fromhex(pre["profile"])).moe_layers else 22


def rows_of(pre: dict[str, Any], raw: bytes) -> tuple[Any, ...]:
    wide = width(pre)
    return tuple(row_of(raw[at : at + wide]) for at in range(0, len(raw), wide))


def domain_of(pre: dict[str, Any]) -> Domain:
    return Domain(int(pre["chain_id"]), Address(bytes.fromhex(pre["verifying_contract"])))


def account_of(pre: dict[str, Any]) -> Work:
    """The account that a vector's documents and increments lead to."""
    domain = domain_of(pre)
    request = unpack(JobRequest, bytes.fromhex(pre["request"]))
    salt = bytes.fromhex(pre["cache_salt"])
    work = Work.start(
        JobId(digest(domain, request)),
        request,
        decode_options(bytes.fromhex(pre["options"])),
        unpack(Tariff, bytes.fromhex(pre["tariff"])),
        unpack(Profile, bytes.fromhex(pre["profile"])),
        unpack(Accept, bytes.fromhex(pre["accept"])),
        block_heads(salt, range(request.prompt_tokens)) if salt else (),
        pre["accepted_seen"],
    ).hit(pre["cached_tokens"], kept=pre["is_kept"])
    for index, vector in enumerate(pre["vectors"]):
        work = work.take_vector(index, bytes.fromhex(vector), pre["first_seen"])
    seen = pre["first_seen"]
    for number, increment in enumerate(pre["increments"]):
        rows = rows_of(pre, bytes.fromhex(increment))
        work = work.take(rows, seen) if rows else work
        if number == 0 and rows and len(pre["increments"]) > 1:
            work = replace(work, first_token_at=pre["first_token_at"])  # as the first receipt said it
        if number + 1 < len(pre["increments"]):
            work, receipt = work.receipt(FinishReason.OPEN, 0, Wei(int(pre["vouched"])))
            work = work.sealed(digest(domain, receipt)).waited(pre["wait_ms"])
    return work


@pytest.mark.parametrize("case", VECTORS, ids=named)
def test_receipt_vectors(case: dict[str, Any]) -> None:
    pre, given = case["pre"], case["input"]
    work, claimed = account_of(pre), unpack(WorkReceipt, bytes.fromhex(given["receipt"]))
    if "post" not in case:
        with pytest.raises(ReceiptMismatch):
            check_receipt(domain_of(pre), work, claimed, given["now_ms"])
        return
    _, receipt_digest = check_receipt(domain_of(pre), work, claimed, given["now_ms"])
    assert receipt_digest.hex() == case["post"]["digest"] and str(claimed.total) == case["post"]["total"]


def test_the_vectors_are_those_that_are_generated() -> None:
    """After a change that is meant: python -m tests.protocol.receipt_vectors"""
    assert PATH.read_text() == text()


# ------------------------------------------------------------------------------------------- worked out a second time


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def counts_of(pre: dict[str, Any], request: JobRequest) -> Usage:
    """Counts read off the increments."""
    options = decode_options(bytes.fromhex(pre["options"]))
    if request.kind == JobKind.EMBED:
        return Usage(sum(options.inputs[: len(pre["vectors"])]), 0, 0, 0)
    profile = unpack(Profile, bytes.fromhex(pre["profile"]))
    ids = [row.token_id for raw in pre["increments"] for row in rows_of(pre, bytes.fromhex(raw))]
    reasoning, inside = 0, options.reasoning_open
    for token in ids if profile.reasoning_start != profile.reasoning_end else []:
        inside = inside or token == profile.reasoning_start
        reasoning += inside
        inside = inside and token != profile.reasoning_end
    return Usage(request.prompt_tokens, pre["cached_tokens"], len(ids), reasoning)


@pytest.mark.parametrize("case", SOUND, ids=named)
def test_counts_and_money_of_the_vectors(case: dict[str, Any]) -> None:
    pre, receipt = case["pre"], unpack(WorkReceipt, bytes.fromhex(case["input"]["receipt"]))
    request = unpack(JobRequest, bytes.fromhex(pre["request"]))
    usage, tariff = counts_of(pre, request), unpack(Tariff, bytes.fromhex(pre["tariff"]))
    stated = (receipt.prompt_tokens, receipt.cached_tokens, receipt.completion_tokens, receipt.reasoning_tokens)
    assert stated == (usage.prompt, usage.cached, usage.completion, usage.reasoning)
    exact = exact_metered(tariff, usage, basis_of(request))
    assert receipt.total == math.ceil(exact) + tariff.per_request - receipt.refund


@pytest.mark.parametrize("case", SOUND, ids=named)
def test_work_of_the_vectors(case: dict[str, Any]) -> None:
    """Every query counted by itself; this profile has no window."""
    pre, receipt = case["pre"], unpack(WorkReceipt, bytes.fromhex(case["input"]["receipt"]))
    request, profile = unpack(JobRequest, bytes.fromhex(pre["request"])), unpack(Profile, bytes.fromhex(pre["profile"]))
    usage = counts_of(pre, request)
    texts = [(usage.cached, usage.prompt + usage.completion)]
    if request.kind == JobKind.EMBED:
        texts = [(0, length) for length in decode_options(bytes.fromhex(pre["options"])).inputs[: len(pre["vectors"])]]
    operations = 2 * profile.head_parameters * usage.completion
    for start, end in texts:
        operations += 2 * profile.body_parameters * (end - start)
        operations += 4 * profile.heads * profile.head_dim * profile.layers * sum(range(start + 1, end + 1))
    assert profile.window == 0 and receipt.ste_micro == math.ceil(Fraction(operations, 16_000))


@pytest.mark.parametrize("case", SOUND, ids=named)
def test_hashes_of_the_vectors(case: dict[str, Any]) -> None:
    pre, receipt = case["pre"], unpack(WorkReceipt, bytes.fromhex(case["input"]["receipt"]))
    request = unpack(JobRequest, bytes.fromhex(pre["request"]))
    head, routing = sha(b"tally/transcript/start/1", digest(domain_of(pre), request)), bytes(32)
    for increment in filter(None, pre["increments"]):
        raw = bytes.fromhex(increment)
        head = sha(b"tally/transcript/head/1", head, sha(b"tally/transcript/leaf/1", raw))
        experts = b"".join(raw[at + 22 : at + 30] for at in range(0, len(raw), 30)) if width(pre) == 30 else b""
        routing = sha(b"tally/transcript/routing/1", routing, experts) if experts else routing
    for vector in pre["vectors"]:
        leaf = sha(b"tally/transcript/vector/1", bytes.fromhex(vector))
        head = sha(b"tally/transcript/head/1", head, leaf)
    assert (receipt.leaves_root, receipt.routing_root) == (head, routing)
    salt = bytes.fromhex(pre["cache_salt"])
    heads = [sha(b"tally/cache/start/1", salt)]
    for at in range(0, request.prompt_tokens - 31 if salt else 0, 32):
        block = b"".join(token.to_bytes(4, "big") for token in range(at, at + 32))
        heads.append(sha(b"tally/cache/head/1", heads[-1], sha(b"tally/cache/block/1", salt, block)))
    assert receipt.prompt_head == (heads[-1] if len(heads) > 1 else bytes(32))
    assert receipt.cache_head == (heads[pre["cached_tokens"] // 32] if pre["cached_tokens"] else bytes(32))
