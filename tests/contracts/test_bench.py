"""The committee's rules on chain are the Python's: draw, quorum, medians, gaps, and what a verdict may not claim."""

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
from incentives.audit_draw import GAPS, gaps_match, median_gaps, pack_gaps
from incentives.committee import CaseState, Vote, decide, draw_committee, quorum
from incentives.evidence import MAX_TOKENS, Evidence
from incentives.verdicts import contradicts_itself
from protocol.eip712 import fields_of
from protocol.messages import Verdict
from protocol.units import ZERO_ADDRESS, ZERO_DIGEST, Address, AuditOutcome, Digest

VECTORS = json.loads((audit_vectors.FOLDER / "audit.json").read_text())
BEACON = bytes.fromhex(VECTORS["beacon"])
SEAT = "(address,uint8,uint8,uint32,uint32,uint16,bytes32)"
VERDICT = f"({','.join(sol for _, sol in fields_of(Verdict))})"
REVEALED, SUBMITTED, REMOVED = 2, 1, 3
ON_AN_EVM = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

Call = Callable[[str, Sequence[str], Sequence[Any], Sequence[str]], Any]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Calls the libraries in an EVM: (function, types, values, result types) -> results; RuntimeError on a revert."""
    out = tmp_path_factory.mktemp("forge") / "out"
    build.compile_sources(out, "test/BenchHarness.sol")
    output = json.loads((out / "BenchHarness.sol" / "BenchHarness.json").read_text())
    caller = "0x" + "11" * 20
    evm = EVM()
    address = evm.deploy(caller, bytes.fromhex(output["bytecode"]["object"][2:]))

    def call(name: str, types: Sequence[str], values: Sequence[Any], results: Sequence[str]) -> Any:
        data = keccak(f"{name}({','.join(types)})".encode())[:4] + encode(types, values)
        return decode(results, bytes(evm.message_call(caller, address, calldata=data)))

    return call


def shown(members: Sequence[bytes]) -> list[str]:
    return ["0x" + member.hex() for member in members]


DRAW = ("bytes32", "uint256", "address[]", "address[]", "uint256")


def test_draws_are_the_vectors(harness: Call) -> None:
    everybody = ["0x" + text for text in VECTORS["validators"]]
    for case in VECTORS["committee"]:
        eligible, seated = everybody[: case["eligible"]], everybody[: case["before"]]
        (drawn,) = harness("committee", DRAW, (BEACON, case["round"], eligible, seated, case["size"]), ["address[]"])
        assert [member.removeprefix("0x") for member in drawn] == case["post"]


@ON_AN_EVM
@given(st.sets(st.binary(min_size=20, max_size=20), min_size=3, max_size=30), st.integers(3, 21), st.data())
def test_draws_agree_everywhere(harness: Call, wallets: set[bytes], size: int, data: st.DataObject) -> None:
    eligible = [Address(wallet) for wallet in sorted(wallets)]
    seated = data.draw(st.lists(st.sampled_from(eligible), max_size=9, unique=True))
    beacon, round_ = Digest(data.draw(st.binary(min_size=32, max_size=32))), data.draw(st.integers(0, 2))
    values = (beacon, round_, shown(eligible), shown(seated), size)
    (drawn,) = harness("committee", DRAW, values, ["address[]"])
    assert list(drawn) == shown(draw_committee(beacon, round_, eligible, size, seated))


def test_quorums_agree(harness: Call) -> None:
    for size, needed in VECTORS["quorum"]:
        assert harness("quorum", ["uint256"], [size], ["uint256"]) == (needed,) == (quorum(size),)


def test_gaps_are_the_vectors(harness: Call) -> None:
    for one, other, alike in VECTORS["gaps_match"]:
        values = (bytes.fromhex(one), bytes.fromhex(other))
        assert harness("matching", ("bytes32", "bytes32"), values, ["bool"]) == (alike,)
    gaps = [bytes.fromhex(text) for text in VECTORS["gaps"]]
    for count, median in VECTORS["median"]:
        assert harness("median", ["bytes32[]"], [gaps[:count]], ["bytes32"]) == (bytes.fromhex(median),)


gaps_ = st.lists(st.integers(-32_768, 32_767) | st.integers(-400, 400), min_size=GAPS, max_size=GAPS).map(pack_gaps)


@ON_AN_EVM
@given(st.lists(gaps_, min_size=1, max_size=9))
def test_gaps_agree_everywhere(harness: Call, vectors: list[Digest]) -> None:
    assert harness("median", ["bytes32[]"], [vectors], ["bytes32"]) == (median_gaps(vectors),)
    one, other = vectors[0], vectors[-1]
    assert harness("matching", ("bytes32", "bytes32"), (one, other), ["bool"]) == (gaps_match(one, other),)


outcomes = st.sampled_from([AuditOutcome.PASS, AuditOutcome.PASS, *AuditOutcome])
counts = st.tuples(st.integers(0, 1 << 31), st.integers(0, 1 << 31), st.integers(0, 65_535))


@ON_AN_EVM
@given(st.lists(st.tuples(outcomes, counts, gaps_, st.booleans()), min_size=3, max_size=9))
def test_what_a_round_finds_agrees(
    harness: Call, rows: list[tuple[AuditOutcome, tuple[int, int, int], Digest, bool]]
) -> None:
    """Seats that revealed count; those that did not, or were removed, keep their place in the quorum."""
    seats, votes = [], []
    for number, (outcome, (tokens, flags, voids), gaps, is_silent) in enumerate(rows):
        voids, flags, tokens = sorted((tokens, flags, voids))
        voids = min(voids, 65_535)
        wallet = Address(number.to_bytes(20, "big"))
        status = (SUBMITTED, REMOVED)[number % 2] if is_silent else REVEALED
        seats.append((shown([wallet])[0], status, int(outcome), tokens, flags, voids, gaps))
        if not is_silent:
            votes.append(Vote(wallet, outcome, tokens, flags, voids, gaps))
    finding = "(uint256,uint256,uint256,bytes32)"
    decided, outcome, measured = harness("found", [SEAT + "[]"], [seats], ["bool", "uint8", finding])
    ours = decide(len(seats), votes, True, Evidence(), 1_000)
    assert decided == (ours.found is not None)
    if ours.found is not None:
        assert (outcome, *measured) == (ours.found, ours.tokens, ours.flags, ours.voids, ours.gaps)
    else:
        assert ours.state is CaseState.UNDECIDED


few = st.integers(0, 80)
many = st.sampled_from([0, 1, 6, 64, 1_024, MAX_TOKENS, MAX_TOKENS + 1, (1 << 32) - 1])


@ON_AN_EVM
@given(st.sampled_from(AuditOutcome), st.tuples(*[few | many] * 6), st.sampled_from([1, 120, 1_000, 20_000]))
def test_contradictions_agree(harness: Call, outcome: AuditOutcome, counted: tuple[int, ...], ppm: int) -> None:
    verdict = Verdict(
        ZERO_ADDRESS, ZERO_DIGEST, 0, outcome, *counted, ZERO_DIGEST, ZERO_DIGEST, ZERO_DIGEST,
    )  # fmt: skip
    ours = contradicts_itself(verdict, ppm)
    values = [getattr(verdict, name) for name, _ in fields_of(Verdict)]
    values[0] = shown([ZERO_ADDRESS])[0]
    assert harness("contradicts", (VERDICT, "uint256"), (tuple(values), ppm), ["bool"]) == (ours,)


@ON_AN_EVM
@given(st.data(), st.integers(0, 80), st.sampled_from([1, 120, 1_000, 20_000]))
def test_plausible_verdicts_agree(harness: Call, data: st.DataObject, tokens: int, ppm: int) -> None:
    """Counts that can be, so that the tail decides."""
    flags = data.draw(st.integers(0, min(tokens, 8)))
    voids = data.draw(st.integers(0, flags))
    outcome = data.draw(st.sampled_from(AuditOutcome))
    verdict = Verdict(
        ZERO_ADDRESS, ZERO_DIGEST, 0, outcome, tokens, flags, voids, tokens, flags, voids, *[ZERO_DIGEST] * 3
    )  # fmt: skip
    values = [getattr(verdict, name) for name, _ in fields_of(Verdict)]
    values[0] = shown([ZERO_ADDRESS])[0]
    ours = contradicts_itself(verdict, ppm)
    assert harness("contradicts", (VERDICT, "uint256"), (tuple(values), ppm), ["bool"]) == (ours,)
