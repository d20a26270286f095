"""Writes tests/vectors/price.json: receipts and what their tariff gives, which Solidity has to reproduce to the wei.

The numbers are those of protocol/tariff.py; contracts/src/Price.sol judges wrong prices by them. A vector without
`post` is a sale that cannot be: both sides must refuse it. Run `python -m contracts.price_vectors` to write, with
`--check` to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from eth_hash.auto import keccak

from protocol.eip712 import fields_of
from protocol.errors import FieldOutOfRange, TierNotOffered
from protocol.messages import Tariff, WorkReceipt
from protocol.metering import Usage
from protocol.tariff import Cost, Timing, basis_of, cost_up

PATH: Final = Path(__file__).resolve().parent.parent / "tests" / "vectors" / "price.json"

TALLY: Final = 10**18
DRAWN: Final = 200
"""Sales drawn from hashes beside the named ones. Doubling it doubles the file."""


def _blank(struct: type, **values: Any) -> Any:
    """A document of zeros but for `values`."""
    zeros = {"address": b"\0" * 20, "bytes32": b"\0" * 32, "bool": False}
    return struct(**{name: values.get(name, zeros.get(sol, 0)) for name, sol in fields_of(struct)})


SHEET: Final[Tariff] = _blank(
    Tariff,
    prompt_price=1_000,
    cached_price=100,
    completion_price=3_001,
    reasoning_price=4_007,
    per_request=77,
    flex_bps=5_000,
    standard_bps=10_000,
    priority_bps=19_999,
    standard_ttft_ms=1_000,
    priority_ttft_ms=250,
    standard_tpot_ms=100,
    priority_tpot_ms=20,
    standard_refund_bps=1_000,
    priority_refund_bps=5_001,
    long_context_threshold=32_000,
    long_context_bps=15_001,
    privacy_bps=12_003,
    reserved_discount_bps=2_000,
    embedding_price=201,
    base_min_bps=8_000,
    base_max_bps=20_000,
    valid_from=1_700_000_000,
    valid_until=1_800_000_000,
)

RECEIPT: Final[WorkReceipt] = _blank(
    WorkReceipt,
    tier=1,
    base_bps=10_000,
    prompt_tokens=100,
    cached_tokens=32,
    completion_tokens=50,
    reasoning_tokens=20,
    received_at=1_750_000_000_000,
    first_token_at=1_750_000_000_500,
)


@dataclass(frozen=True, slots=True)
class Sale:
    """A receipt whose counts are priced under a tariff: the fields that differ from SHEET and RECEIPT."""

    name: str
    tariff: Mapping[str, Any] = field(default_factory=dict)
    receipt: Mapping[str, Any] = field(default_factory=dict)

    def documents(self) -> tuple[Tariff, WorkReceipt]:
        return replace(SHEET, **self.tariff), replace(RECEIPT, **self.receipt)


def cost_of(tariff: Tariff, receipt: WorkReceipt) -> Cost | None:
    """What the receipt's counts cost; None when such a sale cannot be."""
    try:
        usage = Usage(receipt.prompt_tokens, receipt.cached_tokens, receipt.completion_tokens, receipt.reasoning_tokens)
        timing = Timing(receipt.received_at, receipt.first_token_at, receipt.finished_at, receipt.waited_ms)
        return cost_up(tariff, usage, basis_of(receipt), timing)
    except (FieldOutOfRange, TierNotOffered):
        return None


def is_in_force(tariff: Tariff, receipt: WorkReceipt) -> bool:
    """Whether the tariff was in force when the job was received."""
    return tariff.valid_from <= receipt.received_at // 1000 < tariff.valid_until


_START: Final = RECEIPT.received_at
_EMBED: Final = {"kind": 1, "cached_tokens": 0, "completion_tokens": 0, "reasoning_tokens": 0}
_ENDED: Final = {"is_final": True, "finished_at": _START + 5_500}
_RESERVED: Final = {"reservation": b"\x77" * 32}

NAMED: Final = (
    Sale("interim, every line"),
    Sale(
        "nothing used", receipt={"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "reasoning_tokens": 0}
    ),
    Sale("rounded up", {"flex_bps": 1}, {"tier": 0}),
    Sale("flex", receipt={"tier": 0}),
    Sale("priority", receipt={"tier": 2}),
    Sale("batch at flex", receipt={"kind": 2, "tier": 0}),
    Sale("batch at standard", receipt={"kind": 2}),
    Sale("a tier at zero", {"standard_bps": 0}),
    Sale("no such tier", receipt={"tier": 3}),
    Sale("no such kind", receipt={"kind": 3}),
    Sale("private", receipt={"is_private": True}),
    Sale("at the long-context threshold", receipt={"prompt_tokens": 32_000}),
    Sale("above the long-context threshold", receipt={"prompt_tokens": 32_001}),
    Sale("everything raised", receipt={"tier": 2, "is_private": True, "prompt_tokens": 50_000, "base_bps": 20_000}),
    Sale("base at its least", receipt={"base_bps": 8_000}),
    Sale("base too low", receipt={"base_bps": 7_999}),
    Sale("base too high", receipt={"base_bps": 20_001}),
    Sale("reserved", receipt={**_RESERVED, "base_bps": 8_000}),
    Sale("reserved at another discount", receipt={**_RESERVED, "base_bps": 10_000}),
    Sale("reserved at a discount above one", {"reserved_discount_bps": 10_001}, _RESERVED),
    Sale("embedding", receipt=_EMBED),
    Sale("embedding, long", receipt={**_EMBED, "prompt_tokens": 40_000}),
    Sale("embedding with a cache hit", receipt={**_EMBED, "cached_tokens": 1}),
    Sale("embedding with output", receipt={**_EMBED, "completion_tokens": 1}),
    Sale("more cached than prompt", receipt={"cached_tokens": 101}),
    Sale("more reasoning than output", receipt={"reasoning_tokens": 51}),
    Sale("first token in time", receipt={"first_token_at": _START + 1_000}),
    Sale("first token late", receipt={"first_token_at": _START + 1_001}),
    Sale("ended before a first token, late", receipt={"first_token_at": 0, "finished_at": _START + 1_001}),
    Sale("ended before a first token, in time", receipt={"first_token_at": 0, "finished_at": _START + 1_000}),
    Sale("no token yet", receipt={"first_token_at": 0}),
    Sale("ended slowly", receipt=_ENDED | {"finished_at": _START + 5_401}),
    Sale("ended in time", receipt=_ENDED | {"finished_at": _START + 5_400}),
    Sale("ended slowly, the client's own wait", receipt=_ENDED | {"waited_ms": 100}),
    Sale("one token has no pace", receipt=_ENDED | {"completion_tokens": 1, "reasoning_tokens": 0}),
    Sale("times that run backwards", receipt={"first_token_at": _START - 1, "finished_at": 1}),
    Sale("late at a tier that promises nothing", receipt={"tier": 0, "first_token_at": _START + 10**6}),
    Sale("late at a tier that refunds all", {"standard_refund_bps": 10_000}, {"first_token_at": _START + 10**6}),
    Sale("free", dict.fromkeys(("prompt_price", "cached_price", "completion_price", "reasoning_price"), 0)),
    Sale("more than a voucher holds", {"completion_price": (1 << 96) - 1}),
    Sale(
        "exactly what a voucher holds",
        {"per_request": (1 << 96) - 1},
        {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "reasoning_tokens": 0},
    ),
    Sale(
        "every number at its largest",
        {n: (1 << int(s[4:])) - 1 for n, s in fields_of(Tariff) if s[:4] == "uint"},
        {"base_bps": (1 << 32) - 1, "prompt_tokens": (1 << 32) - 1, "completion_tokens": (1 << 32) - 1},
    ),
    Sale("received before the tariff", receipt={"received_at": 1_699_999_999_999, "first_token_at": 0}),
    Sale("received as the tariff begins", receipt={"received_at": 1_700_000_000_000, "first_token_at": 0}),
    Sale("received as the tariff ends", receipt={"received_at": 1_800_000_000_000, "first_token_at": 0}),
)


def _drawn(index: int) -> Sale:
    """A sale of everyday sizes, a different one for each index."""

    def pick(label: str, below: int) -> int:
        return int.from_bytes(keccak(f"{index}.{label}".encode()), "big") % below

    tariff = {name: pick(name, 5 * TALLY) for name in ("prompt_price", "completion_price", "reasoning_price")}
    tariff |= {"cached_price": pick("cached_price", tariff["prompt_price"] + 1), "per_request": pick("request", TALLY)}
    tariff |= {"embedding_price": pick("embedding_price", TALLY), "long_context_threshold": pick("threshold", 4_000)}
    tariff |= {name: pick(name, 30_000) for name in ("long_context_bps", "privacy_bps", "flex_bps", "priority_bps")}
    tariff |= {"standard_refund_bps": pick("standard_refund_bps", 10_001)}
    prompt, completion = pick("prompt", 8_000), pick("completion", 4_000)
    kind, tier = pick("kind", 3), pick("tier", 3)
    first = _START + pick("ttft", 2_000)
    receipt: dict[str, Any] = {
        "kind": kind,
        "tier": 0 if kind == 2 else tier,
        "is_private": bool(pick("private", 2)),
        "base_bps": 8_000 + pick("base", 12_001),
        "prompt_tokens": prompt,
        "cached_tokens": 0 if kind == 1 else pick("cached", prompt + 1),
        "completion_tokens": 0 if kind == 1 else completion,
        "reasoning_tokens": 0 if kind == 1 else pick("reasoning", completion + 1),
        "first_token_at": first,
        "finished_at": (first + pick("pace", 200) * completion) * pick("final", 2),
        "waited_ms": pick("waited", 5_000),
    }
    return Sale(f"drawn {index}", tariff, receipt)


def sales() -> Iterator[Sale]:
    """All sales of the file, in its order."""
    yield from NAMED
    yield from (_drawn(index) for index in range(DRAWN))


def _plain(value: Any) -> Any:
    """Integers as decimal strings (they pass 2**53), bytes as hex."""
    return value.hex() if isinstance(value, bytes) else value if isinstance(value, bool) else str(value)


def source() -> str:
    """Text of the file."""

    def document(of: Any, like: Any) -> dict[str, Any]:
        struct: Any = type(of)
        names = [name for name, _ in fields_of(struct)]
        return {n: _plain(getattr(of, n)) for n in names if like is None or getattr(of, n) != getattr(like, n)}

    rows = []
    for sale in sales():
        tariff, receipt = sale.documents()
        cost = cost_of(tariff, receipt)
        row: dict[str, Any] = {
            "name": sale.name,
            "tariff": document(tariff, SHEET),
            "receipt": document(receipt, RECEIPT),
        }
        row["in_force"] = is_in_force(tariff, receipt)
        if cost is not None:
            row["post"] = {name: str(value) for name, value in asdict(cost).items()}
        rows.append(json.dumps(row))
    head = json.dumps({"sheet": document(SHEET, None), "receipt": document(RECEIPT, None)}, indent=1)
    return head[:-2] + ',\n "sales": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def main(argv: list[str] | None = None) -> int:
    """Write the file, or with `--check` say whether it is stale and return 1."""
    parser = argparse.ArgumentParser(prog="python -m contracts.price_vectors", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file is stale")
    if parser.parse_args(argv).check:
        if PATH.is_file() and PATH.read_text(encoding="utf-8") == source():
            return 0
        print(f"stale: {PATH.name} (run python -m contracts.price_vectors)", file=sys.stderr)
        return 1
    PATH.write_text(source(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
