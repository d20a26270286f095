"""The audit's arithmetic on chain: the EVM gives the vectors' bits, refuses what they refuse, and costs what it may."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from eth_abi import decode, encode
from eth_hash.auto import keccak
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyrevm import EVM

from contracts import audit_vectors, build
from incentives.evidence import MAX_CASE_TOKENS, MAX_FLAG_PPM, Evidence, tail_up
from protocol.merkle import Entry, prove, root
from protocol.units import MAX_AMOUNT, Digest, JobId, Wei

MERKLE, EVIDENCE = (json.loads((audit_vectors.FOLDER / f"{name}.json").read_text()) for name in ("merkle", "evidence"))
ENTRY, NODE, PROCESS = "(bytes32,bytes32,uint96)", "(bytes32,uint96)", "(uint64,uint128[7])"
VERIFY = (ENTRY, "uint256", "uint256", NODE + "[]", "bytes32", "uint256")
UPDATE = (PROCESS, "uint256", "uint256", "uint256", "uint256")
ON_AN_EVM = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Calls the libraries in an EVM: (function, types, values, result types) -> results; RuntimeError on a revert."""
    out = tmp_path_factory.mktemp("forge") / "out"
    build.compile_sources(out, "test/AuditHarness.sol")
    output = json.loads((out / "AuditHarness.sol" / "AuditHarness.json").read_text())
    caller = "0x" + "11" * 20
    evm = EVM()
    address = evm.deploy(caller, bytes.fromhex(output["bytecode"]["object"][2:]))

    def call(
        name: str, types: Sequence[str], values: Sequence[Any], results: Sequence[str], wide: Sequence[str] = ()
    ) -> Any:
        """`wide`: types to encode by instead, for values that do not fit."""
        data = keccak(f"{name}({','.join(types)})".encode())[:4] + encode(wide or types, values)
        return decode(results, bytes(evm.message_call(caller, address, calldata=data)))

    return call


def test_the_vectors_are_fresh() -> None:
    assert audit_vectors.stale() == []


def test_check_names_the_stale_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_vectors, "BEACON", bytes(32))
    assert audit_vectors.main(["--check"]) == 1
    assert capsys.readouterr().err == "stale: audit.json (run python -m contracts.audit_vectors)\n"


# ----------------------------------------------------------------------------------------------------------- the tree


def entry_of(row: Sequence[str]) -> tuple[bytes, bytes, int]:
    return bytes.fromhex(row[0]), bytes.fromhex(row[1]), int(row[2])


def node_of(row: Sequence[str]) -> tuple[bytes, int]:
    return bytes.fromhex(row[0]), int(row[1])


@pytest.mark.parametrize("case", MERKLE["proof"], ids=lambda case: case["name"])
def test_proofs(harness: Call, case: dict[str, Any]) -> None:
    claim, (top, total) = case["input"], node_of(case["pre"])
    siblings = [node_of(row) for row in claim["siblings"]]
    values = (entry_of(claim["entry"]), claim["index"], claim["count"], siblings, top, total)
    assert harness("verify", VERIFY, values, ["bool"]) == ("post" in case,)


@pytest.mark.parametrize("case", [case for case in MERKLE["root"] if len(case["pre"]) == 1], ids=lambda c: c["name"])
def test_leaves(harness: Call, case: dict[str, Any]) -> None:
    entry = entry_of(case["pre"][0])
    if "post" in case:
        assert harness("leaf", [ENTRY], [entry], [NODE]) == (node_of(case["post"]),)
    elif entry[2] > MAX_AMOUNT:
        wide = ENTRY.replace("uint96", "uint256")
        assert harness("leaf", [ENTRY], [(*entry[:2], MAX_AMOUNT)], [NODE], [wide])
        with pytest.raises(RuntimeError):
            harness("leaf", [ENTRY], [entry], [NODE], [wide])


@ON_AN_EVM
@given(st.lists(st.integers(0, MAX_AMOUNT // 40), min_size=1, max_size=40), st.data())
def test_every_proof_of_the_python_holds_on_chain_at_its_own_index_alone(
    harness: Call, amounts: list[int], data: st.DataObject
) -> None:
    entries = [Entry(JobId(bytes([i]) * 32), Digest(b"\7" * 32), Wei(amount)) for i, amount in enumerate(amounts)]
    top, count = root(entries), len(entries)
    index, other = (data.draw(st.integers(0, count - 1)) for _ in range(2))
    siblings = [(node.hash, node.total) for node in prove(entries, index)]
    entry = (entries[index].job_id, entries[index].receipt, entries[index].amount)
    assert harness("verify", VERIFY, (entry, index, count, siblings, top.hash, top.total), ["bool"]) == (True,)
    assert harness("verify", VERIFY, (entry, other, count, siblings, top.hash, top.total), ["bool"]) == (
        other == index,
    )


def test_a_hostile_sibling_or_count_is_no_proof_and_no_revert(harness: Call) -> None:
    entry, most = (b"\1" * 32, b"\2" * 32, MAX_AMOUNT), (b"\3" * 32, MAX_AMOUNT)
    assert harness("verify", VERIFY, (entry, 0, 2, [most], b"\4" * 32, 2 * MAX_AMOUNT), ["bool"]) == (False,)
    assert harness("verify", VERIFY, (entry, 0, (1 << 256) - 1, [], b"\4" * 32, 1), ["bool"]) == (False,)


# ------------------------------------------------------------------------------------------------------------ evidence

TAIL = ("uint256", "uint256", "uint256")


@pytest.mark.parametrize("case", EVIDENCE["tail"], ids=lambda case: f"{case['n']}-{case['k']}-{case['ppm']}")
def test_tails(harness: Call, case: dict[str, Any]) -> None:
    values = (case["n"], case["k"], case["ppm"])
    if "post" not in case:
        with pytest.raises(RuntimeError):
            harness("tailUp", TAIL, values, ["uint256"])
        return
    assert harness("tailUp", TAIL, values, ["uint256"]) == (int(case["post"]),)


def test_hard_fails(harness: Call) -> None:
    for case in EVIDENCE["hard_fail"]:
        assert harness("hardFail", ("uint256",) * 4, case["input"], ["bool"]) == (case["post"],)


@pytest.mark.parametrize("case", EVIDENCE["process"], ids=lambda case: case["name"])
def test_processes(harness: Call, case: dict[str, Any]) -> None:
    process: tuple[int, Sequence[int]] = (0, [0] * 7)
    if "post" not in case:
        with pytest.raises(RuntimeError):
            harness("update", UPDATE, (process, *case["cases"][-1]), [PROCESS, "uint256"])
        return
    for number, (counts, step) in enumerate(zip(case["cases"], case["post"], strict=True), start=1):
        process, value = harness("update", UPDATE, (process, *counts), [PROCESS, "uint256"])
        assert (process[0], [str(wealth) for wealth in process[1]], str(value)) == (
            number, step["sums"], step["value"],
        )  # fmt: skip


@ON_AN_EVM
@given(st.integers(0, 20_000), st.integers(0, 300), st.integers(1, MAX_FLAG_PPM))
def test_tails_agree_everywhere(harness: Call, n: int, k: int, ppm: int) -> None:
    assert harness("tailUp", TAIL, (n, min(n, k), ppm), ["uint256"]) == (tail_up(n, min(n, k), ppm),)


counts = st.tuples(st.integers(0, MAX_CASE_TOKENS), st.integers(0, MAX_CASE_TOKENS), st.integers(0, MAX_CASE_TOKENS))
small = st.tuples(st.integers(0, 5_000), st.integers(0, 60), st.integers(0, 3))


@ON_AN_EVM
@given(st.lists(st.tuples(counts | small, st.integers(1, MAX_FLAG_PPM)), min_size=1, max_size=8))
def test_processes_agree_everywhere(harness: Call, cases: list[tuple[tuple[int, int, int], int]]) -> None:
    evidence = Evidence()
    for (n, flags, voids), ppm in cases:
        case = (n, min(n, flags), min(n, voids), ppm)
        before = (evidence.cases, evidence.sums)
        evidence = evidence.after(*case)
        after, value = harness("update", UPDATE, (before, *case), [PROCESS, "uint256"])
        assert (after, value) == ((evidence.cases, tuple(evidence.sums)), evidence.value)
