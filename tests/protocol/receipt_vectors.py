"""Receipt vectors: the account that documents and increments lead to, a receipt, and whether it recomputes from them.

`python -m tests.protocol.receipt_vectors` writes tests/vectors/receipt.json. A case without `post` must be refused. The
prompt's token ids are 0, 1, 2, ...; `cache_salt` is empty where the payer named no cache; `increments` are leaves in
canonical bytes, the last one not yet in a leaf; `vectors` are an embedding job's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from protocol.eip712 import digest
from protocol.messages import WorkReceipt
from protocol.options import JobOptions, encode_options, options_hash
from protocol.packing import pack
from protocol.transcript import Leaf, Row
from protocol.units import LEAF_TOKENS, ZERO_DIGEST, Digest, FinishReason, JobKind, Tier, Wei
from protocol.work import CLOCK_SLACK_MS, Work
from tests.protocol.jobs import DOMAIN, EXPERTS, LONG, REQUEST, SALT, START, Job, Stage, row, stages
from tests.protocol.sheets import PROFILE

PATH: Final = Path(__file__).parents[1] / "vectors" / "receipt.json"
OTHER: Final = Digest(b"\x77" * 32)

BY_LENGTH: Final = replace(LONG, request=replace(REQUEST, max_tokens=64))
QUIET: Final = replace(LONG, frames=(), finish=FinishReason.CANCELLED, cached=0, lag_ms=0)
LATE: Final = replace(LONG, frames=tuple((rows, 3_000) for rows, _ in LONG.frames))
KEPT: Final = replace(LONG, kept=True)
THINKING: Final = replace(
    LONG,
    profile=replace(PROFILE, reasoning_start=40, reasoning_end=50),
    options=JobOptions(reasoning_open=True, stop_ids=(79,), presence_milli=-250),
)
"""The template opened its reasoning block, which runs on past the start marker 40 to the end at 50: 51 tokens."""

ROUTED: Final = replace(
    LONG,
    profile=EXPERTS,
    frames=tuple((tuple(row(t.token_id, bytes([t.token_id] * 8)) for t in rows), at) for rows, at in LONG.frames),
)
BATCH: Final = replace(
    LONG,
    request=replace(LONG.request, kind=JobKind.BATCH, tier=Tier.FLEX, base_bps=8_000, reservation=OTHER),
    salted=False,
    cached=0,
)
BUSY: Final = replace(LONG, request=replace(LONG.request, tier=Tier.PRIORITY, is_private=True, base_bps=11_250))

TEXTS: Final = (20, 50, 7)
EMBED: Final = replace(
    QUIET,
    request=replace(REQUEST, kind=JobKind.EMBED, prompt_tokens=sum(TEXTS), max_tokens=0),
    options=JobOptions(inputs=TEXTS, dimensions=4),
    salted=False,
)
VECTORS: Final = tuple(bytes([0, 0, 128, 63 + index]) * 4 for index in range(3))


def signed(job: Job) -> Job:
    """With its options in the request."""
    return replace(job, request=replace(job.request, options_hash=options_hash(encode_options(job.options))))


def embedded(job: Job, count: int, finish: FinishReason) -> Stage:
    """The one receipt of an embedding job after `count` vectors, 400 ms apart."""
    work = job.begin(START)
    for index in range(count):
        work = work.take_vector(index, VECTORS[index], START + 400 * (index + 1))
    now = START + 400 * count
    after, receipt = work.receipt(finish, now, job.vouched)
    return Stage(work, receipt, after, now)


def pre(job: Job, client: Work, receipt: WorkReceipt) -> dict[str, Any]:
    """What both sides know when the receipt comes. `first_token_at`: when the client saw it, by its own clock."""
    taken = [t for rows, _ in job.frames for t in rows][: client.completion_tokens]
    leaves = [taken[at : at + LEAF_TOKENS] for at in range(0, len(taken), LEAF_TOKENS)] or [[]]
    return {
        "chain_id": str(DOMAIN.chain_id),
        "verifying_contract": DOMAIN.verifying_contract.hex(),
        "request": pack(job.request).hex(),
        "options": encode_options(job.options).hex(),
        "tariff": pack(job.tariff).hex(),
        "profile": pack(job.profile).hex(),
        "accept": pack(job.accept()).hex(),
        "cache_salt": SALT.hex() if job.salted else "",
        "accepted_seen": client.accepted_seen,
        "first_seen": client.first_seen,
        "wait_ms": job.wait_ms,
        "first_token_at": client.first_token_at,
        "cached_tokens": receipt.cached_tokens,
        "is_kept": receipt.is_kept,
        "increments": [Leaf.of(leaf).to_bytes().hex() if leaf else "" for leaf in leaves],
        "vectors": [vector.hex() for vector in VECTORS[: client.transcript.leaves]] if client.embeds else [],
        "vouched": str(receipt.vouched),
    }


def good(name: str, job: Job, stage: Stage) -> dict[str, Any]:
    """A case that recomputes."""
    post = {"digest": digest(DOMAIN, stage.receipt).hex(), "total": str(stage.receipt.total)}
    return {**bad(name, job, stage), "post": post}


def bad(name: str, job: Job, stage: Stage, late_ms: int = 0, **changes: Any) -> dict[str, Any]:
    """A case whose receipt differs in `changes`, or comes later than it says."""
    claimed = replace(stage.receipt, **changes)
    given = {"receipt": pack(claimed).hex(), "now_ms": stage.now_ms + late_ms}
    return {"name": name, "pre": pre(job, stage.client, stage.receipt), "input": given}


def repriced(name: str, job: Job, stage: Stage, bend: Callable[[Work], Work]) -> dict[str, Any]:
    """A case whose receipt is consistent in itself, from an account that was bent."""
    receipt = stage.receipt
    at_wait = replace(stage.client, waited_ms=receipt.waited_ms, cached_tokens=receipt.cached_tokens)
    at_wait = replace(at_wait, first_token_at=receipt.first_token_at, kept=receipt.is_kept)
    finish = FinishReason(receipt.finish_reason)
    _, bent = bend(at_wait).receipt(finish, receipt.finished_at, Wei(receipt.vouched))
    return bad(name, job, replace(stage, receipt=receipt), **{item: getattr(bent, item) for item in bent.__slots__})


def recomputing() -> Iterator[dict[str, Any]]:
    """Cases of honest jobs."""
    first, second, final = stages(LONG)
    yield good("first increment", LONG, first)
    yield good("second increment", LONG, second)
    yield good("final, short leaf", LONG, final)
    yield good("the end 1000 ms before the client's", LONG, replace(final, now_ms=final.now_ms + 1_000))
    yield good("final on a full leaf, by length", BY_LENGTH, stages(BY_LENGTH)[-1])
    yield good("cancelled before the first token", QUIET, stages(QUIET)[-1])
    yield good("refund for a late first token", LATE, stages(LATE)[0])
    yield good("a prompt that is kept", KEPT, stages(KEPT)[-1])
    for name, job in (("in a reasoning block", THINKING), ("a mixture of experts", ROUTED)):
        for number, stage in enumerate(stages(signed(job)), start=1):
            yield good(f"{name}, receipt {number}", signed(job), stage)
    yield good("batch work under a reservation, without a cache", BATCH, stages(BATCH)[-1])
    yield good("private, at priority, in a busy epoch", BUSY, stages(BUSY)[0])
    embed = signed(EMBED)
    yield good("three texts embedded", embed, embedded(embed, 3, FinishReason.STOP))
    yield good("one text of three, then cancelled", embed, embedded(embed, 1, FinishReason.CANCELLED))
    yield good("no text of three, then cancelled", embed, embedded(embed, 0, FinishReason.CANCELLED))


def refused() -> Iterator[dict[str, Any]]:
    """Cases that a client must not sign for."""
    first, second, final = stages(LONG)
    yield bad("a wei too much", LONG, second, total=second.receipt.total + 1)
    yield bad("a token too much", LONG, second, completion_tokens=65)
    yield bad("a lower step", LONG, second, step=1)
    yield bad("another chain of receipts", LONG, second, previous=OTHER)
    yield bad("final, but open", LONG, second, is_final=True)
    yield bad("length before max_tokens", LONG, final, finish_reason=int(FinishReason.LENGTH))
    yield bad("an unknown finish reason", LONG, final, finish_reason=7)
    yield repriced("fewer cached than was said before", LONG, second, lambda work: replace(work, cached_tokens=0))
    yield repriced("a wait longer than the client's", LONG, second, lambda work: replace(work, waited_ms=2_201))
    yield bad("the end 1001 ms before the client's", LONG, final, late_ms=1_001)
    yield repriced(
        "the first token 1 ms later than said before",
        LONG,
        second,
        lambda work: replace(work, first_token_at=work.first_token_at + 1),
    )
    yield bad(
        "a first token further off than the clocks may be", LONG, first, first_token_at=START + CLOCK_SLACK_MS + 431
    )
    for cached in (31, 33, 128):
        yield bad(f"{cached} cached tokens of 100", LONG, first, cached_tokens=cached)
    yield bad("the head of another hit", LONG, first, cache_head=OTHER)
    yield bad("the head of another prompt", LONG, first, prompt_head=OTHER)
    yield bad("kept, said late", LONG, second, is_kept=True)
    batch = stages(BATCH)[0]
    yield bad("cached without a salt", BATCH, batch, cached_tokens=32, cache_head=OTHER)
    yield bad("kept without a salt", BATCH, batch, is_kept=True)
    thinking, routed = signed(THINKING), signed(ROUTED)
    more = {"reasoning": replace(stages(thinking)[-1].client.reasoning, tokens=52)}
    yield repriced("a reasoning token too many", thinking, stages(thinking)[-1], lambda work: replace(work, **more))
    yield bad("another routing root", routed, stages(routed)[0], routing_root=OTHER)
    yield bad("a routing root of a dense model", LONG, first, routing_root=OTHER)
    for name, changes in (
        ("another base multiplier", {"base_bps": 10_001}),
        ("another tier", {"tier": Tier.FLEX}),
        ("another kind", {"kind": JobKind.EMBED}),
        ("a reservation", {"reservation": OTHER}),
        ("a private job", {"is_private": True}),
        ("another's work", {"ste_micro": first.receipt.ste_micro + 1}),
    ):
        yield bad(name, LONG, first, **changes)
    embed = signed(EMBED)
    done, cut = embedded(embed, 3, FinishReason.STOP), embedded(embed, 1, FinishReason.CANCELLED)
    yield bad("texts that were not delivered", embed, cut, prompt_tokens=70)
    yield bad("stopped before the last text", embed, cut, finish_reason=int(FinishReason.STOP))
    yield bad("cancelled after the last text", embed, done, finish_reason=int(FinishReason.CANCELLED))
    yield bad("an embedding job by length", embed, done, finish_reason=int(FinishReason.LENGTH))
    yield bad("an embedding job with a prompt head", embed, done, prompt_head=OTHER)
    yield bad("the vectors of another job", embed, done, leaves_root=ZERO_DIGEST)


def text() -> str:
    """The file: one case per line."""
    return "[\n" + ",\n".join(" " + json.dumps(case) for case in (*recomputing(), *refused())) + "\n]\n"


def row_of(raw: bytes) -> Row:
    """A record of a leaf in canonical bytes."""
    return Row(int.from_bytes(raw[:4], "big"), raw[4:6], raw[6:22], raw[22:])


if __name__ == "__main__":
    PATH.write_text(text())
