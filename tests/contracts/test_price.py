"""A wrong price is proved on chain by the integers that clients and providers compute with: vectors, and draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import pytest
from eth_abi.abi import decode, encode
from eth_hash.auto import keccak
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyrevm import EVM

from contracts import build, price_vectors
from protocol.eip712 import fields_of
from protocol.messages import Tariff, WorkReceipt

VECTORS = json.loads(price_vectors.PATH.read_text())
TYPES = [f"({','.join(sol for _, sol in fields_of(struct))})" for struct in (Tariff, WorkReceipt)]
COST = "(uint256,uint256,uint256,uint256,uint256,uint256,uint256,uint256)"
LINES = ("prompt_line", "cached_line", "completion_line", "reasoning_line", "multiplier", "per_request", "refund")

Call = Callable[[str, Tariff, WorkReceipt, list[str]], Any]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Calls the price formula in an EVM: (function, tariff, receipt, result types) -> results."""
    out = tmp_path_factory.mktemp("forge") / "out"
    build.compile_sources(out, "test/PriceHarness.sol")
    output = json.loads((out / "PriceHarness.sol" / "PriceHarness.json").read_text())
    caller = "0x" + "11" * 20
    evm = EVM()
    address = evm.deploy(caller, bytes.fromhex(output["bytecode"]["object"][2:]))

    def call(name: str, tariff: Tariff, receipt: WorkReceipt, results: list[str]) -> Any:
        data = keccak(f"{name}({','.join(TYPES)})".encode())[:4] + encode(TYPES, [words(tariff), words(receipt)])
        return decode(results, bytes(evm.message_call(caller, address, calldata=data)))

    return call


def words(document: Any) -> tuple[Any, ...]:
    struct: Any = type(document)
    fields = fields_of(struct)
    return tuple(
        "0x" + getattr(document, name).hex() if sol == "address" else getattr(document, name) for name, sol in fields
    )


def document(struct: type, base: dict[str, Any], changes: dict[str, Any]) -> Any:
    shown = base | changes

    def value(name: str, sol: str) -> Any:
        if sol == "bool":
            return shown[name]
        return bytes.fromhex(shown[name]) if sol in ("address", "bytes32") else int(shown[name])

    return struct(**{name: value(name, sol) for name, sol in fields_of(struct)})


def agrees(harness: Call, tariff: Tariff, receipt: WorkReceipt) -> None:
    """The EVM prices the receipt as Python does, and takes the receipt that carries those lines and no other."""
    due = price_vectors.cost_of(tariff, receipt)
    possible, cost = harness("costUp", tariff, receipt, ["bool", COST])
    lines = [getattr(due, name, 0) for name in (*LINES, "total") if name != "multiplier"]
    if due is None or due.multiplier >> 64 or any(line >> 96 for line in lines):
        # No receipt can carry such lines, so every receipt is wrong.
        assert harness("holds", tariff, receipt, ["bool"]) == (False,)
        return
    assert possible and cost == astuple(due)
    right = replace(receipt, total=due.total, **{name: getattr(due, name) for name in LINES})
    in_force = price_vectors.is_in_force(tariff, receipt)
    assert harness("holds", tariff, right, ["bool"]) == (in_force,)
    for name in (*LINES, "total"):
        wrong = replace(right, **{name: getattr(right, name) ^ 1})
        assert harness("holds", tariff, wrong, ["bool"]) == (False,), name


def test_the_vectors_are_fresh_and_say_both() -> None:
    assert price_vectors.main(["--check"]) == 0
    assert {"post" in sale for sale in VECTORS["sales"]} == {True, False}
    assert {sale["in_force"] for sale in VECTORS["sales"]} == {True, False}
    assert sum(int(sale["post"]["refund"]) > 0 for sale in VECTORS["sales"] if "post" in sale) > 20


@pytest.mark.slow
def test_the_evm_prices_the_vectors(harness: Call) -> None:
    for sale in VECTORS["sales"]:
        tariff = document(Tariff, VECTORS["sheet"], sale["tariff"])
        receipt = document(WorkReceipt, VECTORS["receipt"], sale["receipt"])
        possible, cost = harness("costUp", tariff, receipt, ["bool", COST])
        assert possible == ("post" in sale), sale["name"]
        assert not possible or cost == tuple(int(value) for value in sale["post"].values()), sale["name"]
        agrees(harness, tariff, receipt)


def fields_drawn(struct: type, base: Any) -> st.SearchStrategy[Any]:
    """`base` with some integer fields anything that fits, extremes included."""
    sizes = {name: int(sol[4:]) for name, sol in fields_of(struct) if sol.startswith("uint")}
    values = {n: st.integers(0, (1 << bits) - 1) | st.just((1 << bits) - 1) for n, bits in sizes.items()}
    return st.fixed_dictionaries({}, optional=values).map(lambda changes: replace(base, **changes))


@pytest.mark.slow
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields_drawn(Tariff, price_vectors.SHEET),
    fields_drawn(WorkReceipt, price_vectors.RECEIPT),
)
def test_the_evm_prices_whatever_fits_the_fields(harness: Call, tariff: Tariff, receipt: WorkReceipt) -> None:
    agrees(harness, tariff, receipt)
