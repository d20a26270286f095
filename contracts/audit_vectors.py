"""Writes the vectors that the audit's Python and Solidity are both held to: merkle.json, evidence.json and audit.json.

They are derived from the Python, which tests hold to exact arithmetic of their own; the Solidity has to give the same
bits. Run `python -m contracts.audit_vectors` to write, `python -m contracts.audit_vectors --check` to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from eth_hash.auto import keccak

from incentives.audit_draw import (
    case_key,
    gap_positions,
    gaps_match,
    is_drawn,
    is_forced,
    lot_of,
    median_gaps,
    pack_gaps,
)
from incentives.committee import draw_committee, quorum
from incentives.evidence import MAX_FLAG_PPM, MAX_TOKENS, Evidence, hard_fail, tail_up
from protocol.errors import FieldOutOfRange
from protocol.merkle import Entry, SumNode, leaf, ordered, prove, root, verify
from protocol.units import MAX_AMOUNT, Address, Digest, JobId, Wei

FOLDER: Final = Path(__file__).resolve().parent.parent / "tests" / "vectors"
BEACON: Final = Digest(keccak(b"beacon"))


def _word(label: str) -> Digest:
    """A fixed pattern."""
    return Digest(keccak(label.encode()))


# ----------------------------------------------------------------------------------------------------------- the tree


def entries(count: int) -> list[Entry]:
    """`count` fixed entries in the tree's order; the amounts tell them apart."""
    made = [Entry(JobId(_word(f"job {i}")), _word(f"receipt {i}"), Wei((i + 1) * 10**17)) for i in range(count)]
    return ordered(made)


def _entry(entry: Entry) -> list[str]:
    return [entry.job_id.hex(), entry.receipt.hex(), str(entry.amount)]


def _node(node: SumNode) -> list[str]:
    return [node.hash.hex(), str(node.total)]


def _roots() -> Iterator[dict[str, Any]]:
    full = Entry(JobId(b"\1" * 32), Digest(b"\2" * 32), Wei(MAX_AMOUNT))
    for count in (0, 1, 2, 3, 5, 8, 33):
        yield _root(f"{count} jobs", entries(count))
    yield _root("a free job", [replace(full, amount=Wei(0))])
    yield _root("the largest amount", [full])
    yield _root("an amount above uint96", [replace(full, amount=Wei(MAX_AMOUNT + 1))])
    yield _root("a negative amount", [replace(full, amount=Wei(-1))])
    yield _root("a total above uint96", [full, replace(full, job_id=JobId(b"\2" * 32), amount=Wei(1))])
    yield _root("a job id of 31 bytes", [replace(full, job_id=JobId(b"\1" * 31))])
    yield _root("a receipt of 33 bytes", [replace(full, receipt=Digest(b"\1" * 33))])


def _root(name: str, given: list[Entry]) -> dict[str, Any]:
    out: dict[str, Any] = {"name": name, "pre": [_entry(entry) for entry in given]}
    try:
        return {**out, "post": _node(root(given))}
    except FieldOutOfRange:
        return out


def _proofs() -> Iterator[dict[str, Any]]:
    """A proof without `post` must not hold."""
    for count in (1, 2, 3, 5, 8, 33):
        for index in sorted({0, count // 2, count - 1}):
            yield _proof(f"leaf {index} of {count}", entries(count), index)
    five, three = entries(5), entries(3)
    first = prove(five, 0)
    yield _proof("another index", five, 0, claimed_index=1)
    yield _proof("an index beyond the count", five, 0, claimed_index=5)
    yield _proof("a smaller count", five, 0, claimed_count=4)
    yield _proof("a larger count", five, 0, claimed_count=9)
    yield _proof("a count of zero", five, 0, claimed_count=0)
    yield _proof(
        "a count that the root alone does not exclude: the Commitment states it",
        five,
        4,
        claimed_index=2,
        claimed_count=3,
    )
    yield _proof("another amount", five, 0, entry=replace(five[0], amount=Wei(five[0].amount + 1)))
    yield _proof("another receipt", five, 0, entry=replace(five[0], receipt=Digest(b"\7" * 32)))
    yield _proof("another job", five, 0, entry=replace(five[0], job_id=JobId(b"\7" * 32)))
    yield _proof("a step short", five, 0, siblings=first[:-1])
    yield _proof("a step long", five, 0, siblings=(*first, first[-1]))
    yield _proof("no step", five, 0, siblings=())
    yield _proof("another sum", five, 0, siblings=(replace(first[0], total=Wei(first[0].total + 1)), *first[1:]))
    yield _proof("the largest sum", five, 0, siblings=(replace(first[0], total=Wei(MAX_AMOUNT)), *first[1:]))
    inner = root(three[:2])
    packed = Entry(JobId(leaf(three[0]).hash), Digest(leaf(three[1]).hash), inner.total)
    yield _proof("an inner node as a leaf", three, 0, entry=packed, siblings=prove(three, 0)[1:], claimed_count=2)


def _proof(
    name: str,
    given: list[Entry],
    index: int,
    *,
    entry: Entry | None = None,
    siblings: tuple[SumNode, ...] | None = None,
    claimed_index: int | None = None,
    claimed_count: int | None = None,
) -> dict[str, Any]:
    top = root(given)
    entry = given[index] if entry is None else entry
    siblings = prove(given, index) if siblings is None else siblings
    at = index if claimed_index is None else claimed_index
    count = len(given) if claimed_count is None else claimed_count
    claim = {"entry": _entry(entry), "index": at, "count": count, "siblings": [_node(node) for node in siblings]}
    out = {"name": name, "pre": _node(top), "input": claim}
    return {**out, "post": True} if verify(entry, at, count, siblings, top) else out


# ------------------------------------------------------------------------------------------------------------ evidence

_TAILS: Final = (
    *((n, k, 1_000) for n in (64, 256, 1_024, 4_096) for k in (0, 1, 4, 5, 6, 7, 8, 12, 13, 22, 64)),
    *((n, k, 20_000) for n in (64, 1_024, 20_000) for k in (1, 5, 21, 22, 40, 60)),
    *((n, k, 1) for n in (1, 32, 64, 1_024, MAX_TOKENS) for k in (1, 2, 3)),
    *((n, k, 120) for n in (0, 1, 500) for k in (0, 1) if k <= n),
    (20_000, 700, 20_000),
    (4_096, 4_096, 1_000),
    (MAX_TOKENS, 1_200, 1_000),
    (5, 6, 1_000),
    (MAX_TOKENS + 1, 6, 1_000),
    (64, 6, 0),
    (64, 6, MAX_FLAG_PPM + 1),
)


def _tail(n: int, k: int, ppm: int) -> dict[str, Any]:
    """A tail without `post` must be refused."""
    try:
        return {"n": n, "k": k, "ppm": ppm, "post": str(tail_up(n, k, ppm))}
    except FieldOutOfRange:
        return {"n": n, "k": k, "ppm": ppm}


_FAILS: Final = (
    *((n, k, 0, 1_000) for n, k in ((64, 5), (64, 6), (256, 7), (256, 8), (1_024, 12), (1_024, 13))),
    (1_024, 3, 2, 1_000),
    (1_024, 3, 3, 1_000),
    (32, 2, 2, 120),
    (0, 0, 0, 1_000),
)

_PASTS: Final[dict[str, Sequence[tuple[int, int, int, int]]]] = {
    "honest": [(1_000, 1, 0, 1_000)] * 6,
    "one flag in forty": [(200, 5, 0, 1_000)] * 20,
    "a void now and then": [(500, 1, 1, 1_000), (500, 0, 0, 1_000), (500, 2, 1, 1_000)],
    "profiles of different rates": [(300, 2, 0, 120), (300, 9, 0, 20_000), (300, 0, 0, 1)],
    "no tokens at all": [(0, 0, 0, 1_000)] * 3,
    "the largest case": [((1 << 32) - 1, 0, 0, 1_000), ((1 << 32) - 1, (1 << 32) - 1, (1 << 32) - 1, 20_000)],
    "more flags than tokens": [(10, 11, 0, 1_000)],
    "more voids than tokens": [(10, 1, 11, 1_000)],
    "no rate": [(10, 1, 0, 0)],
}


def _past(name: str, cases: Sequence[tuple[int, int, int, int]]) -> dict[str, Any]:
    """Step by step; a past without `post` must be refused at its last case."""
    evidence, steps = Evidence(), []
    for case in cases:
        try:
            evidence = evidence.after(*case)
        except FieldOutOfRange:
            return {"name": name, "cases": cases}
        steps.append({"sums": [str(wealth) for wealth in evidence.sums], "value": str(evidence.value)})
    return {"name": name, "cases": cases, "post": steps}


def _evidence() -> dict[str, Any]:
    return {
        "tail": [_tail(*item) for item in _TAILS],
        "hard_fail": [{"input": list(item), "post": hard_fail(*item)} for item in _FAILS],
        "process": [_past(name, cases) for name, cases in _PASTS.items()],
    }


# ---------------------------------------------------------------------------------------------------- draw, committees


def _audit() -> dict[str, Any]:
    provider, profile = Address(_word("provider")[:20]), _word("profile")
    jobs = [JobId(_word(f"job {i}")) for i in range(200)]
    secrets = [_word(f"secret {i}") for i in range(100)]
    validators = [Address(_word(f"validator {i}")[:20]) for i in range(12)]
    gaps = [pack_gaps([i * 10 + shift for i in range(16)]) for shift in (0, 150, 151, 40_000, -40_000)]
    draws = [(0, 5, 3, 0), (1, 5, 7, 3), (1, 12, 7, 3), (2, 12, 21, 10), (0, 12, 3, 0)]
    return {
        "beacon": BEACON.hex(),
        "case_key": [
            [provider.hex(), profile.hex(), epoch, case_key(provider, profile, epoch).hex()]
            for epoch in (0, 7, (1 << 64) - 1)
        ],
        "drawn": [job.hex() for job in jobs if is_drawn(BEACON, job, 50)],
        "lot": [[secret.hex(), lot_of(secret).hex()] for secret in secrets[:3]],
        "forced": [secret.hex() for secret in secrets if is_forced(secret, BEACON, 200)],
        "gap_positions": [
            [list(lengths), gap_positions(BEACON, lengths)] for lengths in ((), (0, 0), (1,), (64, 0, 300))
        ],
        "gaps": [vector.hex() for vector in gaps],
        "gaps_match": [[one.hex(), other.hex(), gaps_match(one, other)] for one in gaps for other in gaps],
        "median": [[count, median_gaps(gaps[:count]).hex()] for count in range(1, 6)],
        "validators": [validator.hex() for validator in validators],
        "committee": [
            {
                "round": round_,
                "eligible": count,
                "size": size,
                "before": before,
                "post": [
                    m.hex() for m in draw_committee(BEACON, round_, validators[:count], size, validators[:before])
                ],
            }
            for round_, count, size, before in draws
        ],
        "quorum": [[size, quorum(size)] for size in range(3, 22)],
    }


def outputs() -> dict[Path, str]:
    """Every vector file and the text it must have."""
    made = {
        "merkle": {"root": list(_roots()), "proof": list(_proofs())},
        "evidence": _evidence(),
        "audit": _audit(),
    }
    return {FOLDER / f"{name}.json": _text(document) for name, document in made.items()}


def _text(document: dict[str, Any]) -> str:
    """One vector a line."""
    parts = []
    for name, value in document.items():
        rows = ",\n".join("  " + json.dumps(row) for row in value) if isinstance(value, list) else None
        parts.append(f" {json.dumps(name)}: " + (f"[\n{rows}\n ]" if rows is not None else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def stale() -> list[Path]:
    """Vector files that are missing or differ from what the Python gives."""
    return [path for path, text in outputs().items() if not path.is_file() or path.read_text("utf-8") != text]


def main(argv: list[str] | None = None) -> int:
    """Write the files, or with `--check` name the stale ones and return 1."""
    parser = argparse.ArgumentParser(prog="python -m contracts.audit_vectors", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 naming stale files")
    if parser.parse_args(argv).check:
        found = stale()
        for path in found:
            print(f"stale: {path.name} (run python -m contracts.audit_vectors)", file=sys.stderr)
        return 1 if found else 0
    for path, text in outputs().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
