"""What documents prove is the same on chain and in Python: each proof is judged by Faults.sol and by
incentives/faults.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from eth_abi import decode, encode
from eth_hash.auto import keccak
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyrevm import EVM

from contracts import artifact, build
from incentives.audit_draw import case_key
from incentives.faults import (
    Fault,
    Placed,
    Proof,
    ProofFails,
    SignedReceipt,
    SignedRoot,
    SignedTariff,
    charge_findings,
    epoch_of,
    judge,
    neighbours,
    out_of_order,
)
from node.chain.court import encode_proof
from protocol import merkle
from protocol.eip712 import Domain, digest
from protocol.merkle import Entry
from protocol.messages import Commitment, Tariff, WorkReceipt
from protocol.signing import Signer
from protocol.units import MAX_AMOUNT, Address, Digest, JobId, Wei
from tests.incentives.trade import NODE, START, TARIFF, WALLET, last, sell

STRANGER = Signer.from_secret(b"\x42" * 32)
CALLER = "0x" + "11" * 20
EPOCH_S = 3_600
EPOCH = START // 1000 // EPOCH_S
LIE, LAPSE = 5_000, 1_000
ON_AN_EVM = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

SHEET = replace(TARIFF, base_min_bps=5_000, base_max_bps=20_000, reserved_discount_bps=1_000)
SOLD = last(sell(tokens=40))


@dataclass(frozen=True, slots=True)
class Bench:
    """Faults.sol in an EVM, before a stage that plays Registry, Escrow and Court."""

    evm: EVM
    stage: str
    faults: str

    @property
    def domain(self) -> Domain:
        return Domain(1, Address(bytes.fromhex(self.stage[2:])))

    def act(self, name: str, types: Sequence[str], values: Sequence[Any]) -> None:
        data = keccak(f"{name}({','.join(types)})".encode())[:4] + encode(types, values)
        self.evm.message_call(CALLER, self.stage, calldata=data)

    def ruling(self, proof: Proof) -> tuple[str, int] | None:
        """(accused, share) as the chain judges the proof; None where it refuses."""
        kind, packed = encode_proof(proof)
        data = keccak(b"judge(uint8,bytes)")[:4] + encode(["uint8", "bytes"], [kind, packed])
        try:
            out = bytes(self.evm.message_call(CALLER, self.faults, calldata=data))
        except RuntimeError:
            return None
        accused, _, share, _, _ = decode(["address", "bytes32", "uint16", "address", "uint96"], out)
        return accused, share


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    out = tmp_path_factory.mktemp("forge") / "out"
    build.compile_sources(out, "test/FaultsStage.sol")
    code = json.loads((out / "FaultsStage.sol" / "FaultsStage.json").read_text())["bytecode"]["object"]
    evm = EVM()
    stage = evm.deploy(CALLER, bytes.fromhex(code[2:]) + encode(["uint32"], [EPOCH_S]))
    parts = encode(["address"] * 3, [stage] * 3)
    faults = evm.deploy(CALLER, bytes.fromhex(artifact("Faults")["bytecode"][2:]) + parts)
    made = Bench(evm, stage, faults)
    made.act("bindKey", ["address", "address"], [shown(NODE.address), shown(WALLET.address)])
    return made


def shown(wallet: bytes) -> str:
    return "0x" + wallet.hex()


def note(domain: Domain, receipt: WorkReceipt, signer: Signer = NODE) -> SignedReceipt:
    return SignedReceipt(receipt, signer.sign(domain, receipt))


def sheet(domain: Domain, tariff: Tariff, signer: Signer = NODE) -> SignedTariff:
    return SignedTariff(tariff, signer.sign(domain, tariff))


def holds(proof: Proof) -> bool:
    try:
        judge(proof)
    except ProofFails:
        return False
    return True


def agree(bench: Bench, proof: Proof, share: int) -> bool:
    """Whether the proof holds, as both sides say."""
    ours = holds(proof)
    assert bench.ruling(proof) == ((shown(WALLET.address), share) if ours else None)
    return ours


# ------------------------------------------------------------------------------------------------------- two documents

signers = st.sampled_from([NODE] * 7 + [STRANGER])
changes = st.fixed_dictionaries(
    {},
    optional={
        "step": st.integers(1, 4),
        "is_final": st.booleans(),
        "prompt_tokens": st.integers(99, 101),
        "completion_tokens": st.integers(39, 41),
        "reasoning_tokens": st.integers(0, 1),
        "ste_micro": st.integers(SOLD.ste_micro - 1, SOLD.ste_micro + 1),
        "total": st.integers(SOLD.total - 1, SOLD.total + 1),
        "refund": st.integers(0, 1),
        "multiplier": st.integers(SOLD.multiplier - 1, SOLD.multiplier),
        "job_id": st.sampled_from([SOLD.job_id] * 5 + [JobId(b"\7" * 32)]),
    },
)


@ON_AN_EVM
@given(changes, changes, st.booleans(), signers, signers)
def test_pairs_of_receipts(
    bench: Bench, one: dict[str, Any], other: dict[str, Any], is_linked: bool, first: Signer, second: Signer
) -> None:
    earlier = replace(SOLD, is_final=False, step=2)
    earlier, later = replace(earlier, **one), replace(earlier, **({"step": 3} | other))
    if is_linked:
        later = replace(later, previous=digest(bench.domain, earlier))
    pair = (note(bench.domain, earlier, first), note(bench.domain, later, second))
    proof = Proof(bench.domain, NODE.address, Fault.TWO_RECEIPTS, (), pair)
    agree(bench, proof, LIE)
    agree(bench, replace(proof, fault=Fault.BROKEN_CHAIN), LIE)


@ON_AN_EVM
@given(st.integers(0, 1), st.integers(7, 8), st.sampled_from([TARIFF.profile_id, b"\7" * 32]), signers)
def test_pairs_of_tariffs(bench: Bench, raised: int, sequence: int, profile: bytes, signer: Signer) -> None:
    one = replace(SHEET, sequence=7)
    other = replace(one, sequence=sequence, profile_id=Digest(profile), prompt_price=one.prompt_price + raised)
    pair = (sheet(bench.domain, one), sheet(bench.domain, other, signer))
    held = agree(bench, Proof(bench.domain, NODE.address, Fault.TWO_TARIFFS, pair), LIE)
    assert held == (raised and sequence == 7 and profile == TARIFF.profile_id and signer is NODE)


# --------------------------------------------------------------------------------------------------------------- price

prices = st.fixed_dictionaries(
    {},
    optional={
        "tier": st.integers(0, 3),
        "kind": st.integers(0, 3),
        "is_private": st.booleans(),
        "base_bps": st.sampled_from([4_999, 5_000, 9_000, 20_000, 20_001]),
        "reservation": st.sampled_from([b"\0" * 32, b"\1" * 32]),
        "cached_tokens": st.integers(0, 101),
        "reasoning_tokens": st.integers(0, 41),
        "first_token_at": st.sampled_from([0, START + 199, START + 10**7]),
        "finished_at": st.sampled_from([0, START + 10**7]),
        "received_at": st.sampled_from([START - 1, START, START + 1]),
        "total": st.sampled_from([0, SOLD.total, SOLD.total + 1, MAX_AMOUNT]),
    },
)
windows = st.sampled_from([(0, 1 << 40), (START // 1000, START // 1000 + 1), (START // 1000 + 1, 1 << 40)])


@ON_AN_EVM
@given(prices, windows, signers, st.booleans(), st.booleans())
def test_prices(
    bench: Bench, bent: dict[str, Any], window: tuple[int, int], signer: Signer, is_logged: bool, is_named: bool
) -> None:
    """A wrong charge is proved on chain exactly where clients find one; of a logged tariff alone."""
    tariff = replace(SHEET, valid_from=window[0], valid_until=window[1], sequence=1 + is_logged)
    named = digest(bench.domain, tariff)
    receipt = replace(SOLD, tariff_hash=named if is_named else digest(bench.domain, TARIFF), **bent)
    if is_logged:
        bench.act("logTariff", ["bytes32", "address"], [named, shown(WALLET.address)])
    found = charge_findings(tariff, receipt)
    proof = Proof(
        bench.domain, NODE.address, found[0].fault if found else Fault.OVERCHARGE, (sheet(bench.domain, tariff),),
        (note(bench.domain, receipt, signer),),
    )  # fmt: skip
    if is_logged:
        agree(bench, proof, LAPSE)
    else:
        assert bench.ruling(proof) is None


# --------------------------------------------------------------------------------------------------------------- trees

jobs = st.lists(st.integers(1, 12), max_size=7, unique=True)


def entries_of(ids: Sequence[int]) -> list[Entry]:
    return [Entry(JobId(bytes([i]) * 32), Digest(b"\5" * 32), Wei(i)) for i in ids]


def committed(bench: Bench, entries: list[Entry]) -> SignedRoot:
    top = merkle.root(entries)
    key = case_key(WALLET.address, Digest(SHEET.profile_id), EPOCH)
    values = [key, shown(WALLET.address), top.hash, len(entries), top.total]
    bench.act("setRoot", ["bytes32", "address", "bytes32", "uint32", "uint96"], values)
    made = Commitment(
        WALLET.address, Digest(SHEET.profile_id), EPOCH, top.hash, len(entries), top.total, Digest(b"\6" * 32)
    )
    return SignedRoot(made, NODE.sign(bench.domain, made))


def of_job(bench: Bench, job: int, fault: Fault, **rest: Any) -> Proof:
    receipt = replace(SOLD, job_id=JobId(bytes([job]) * 32), tariff_hash=digest(bench.domain, SHEET))
    documents = (sheet(bench.domain, SHEET),), (note(bench.domain, receipt),)
    return Proof(bench.domain, NODE.address, fault, *documents, epoch_s=EPOCH_S, **rest)


@ON_AN_EVM
@given(jobs, st.integers(1, 12), st.booleans(), st.data())
def test_jobs_missing_from_trees(bench: Bench, ids: list[int], job: int, is_sorted: bool, data: st.DataObject) -> None:
    """Whatever entries are shown, a job in an honest tree is not missing; one that is not there is, by neighbours."""
    entries = entries_of(sorted(ids) if is_sorted else ids)
    root = committed(bench, entries)
    placed = [Placed(entry, at, merkle.prove(entries, at)) for at, entry in enumerate(entries)]
    some = data.draw(st.lists(st.sampled_from(placed), max_size=3)) if placed else []
    if some and data.draw(st.booleans()):
        some[0] = replace(some[0], index=data.draw(st.integers(0, 8)))
    held = agree(bench, of_job(bench, job, Fault.MISSING, roots=(root,), placed=tuple(some)), LIE)
    if is_sorted:
        assert not (held and job in ids)
        around = neighbours(entries, JobId(bytes([job]) * 32))
        assert (around is None) == (job in ids)
        if around is not None:
            assert agree(bench, of_job(bench, job, Fault.MISSING, roots=(root,), placed=around), LIE)


@ON_AN_EVM
@given(jobs, st.booleans(), st.data())
def test_trees_out_of_order(bench: Bench, ids: list[int], is_sorted: bool, data: st.DataObject) -> None:
    entries = entries_of(sorted(ids) if is_sorted else ids)
    root = committed(bench, entries)
    placed = [Placed(entry, at, merkle.prove(entries, at)) for at, entry in enumerate(entries)]
    proof = Proof(bench.domain, NODE.address, Fault.UNSORTED, (), roots=(root,))
    bent = out_of_order(entries)
    assert (bent is not None) == (ids != sorted(ids) and not is_sorted)
    if bent is not None:
        assert agree(bench, replace(proof, placed=bent), LIE)
    if placed:
        pair = tuple(data.draw(st.lists(st.sampled_from(placed), min_size=2, max_size=2)))
        assert not (agree(bench, replace(proof, placed=pair), LIE) and is_sorted)


def test_the_epoch_and_key_of_a_job_are_the_same(bench: Bench) -> None:
    """A job of the epoch before or after is missing from neither's neighbour."""
    assert epoch_of(SOLD, EPOCH_S) == EPOCH
    root = committed(bench, [])
    proof = of_job(bench, 3, Fault.MISSING, roots=(root,))
    assert agree(bench, proof, LIE)
    for at in (
        EPOCH * EPOCH_S * 1000 - 1,
        EPOCH * EPOCH_S * 1000,
        (EPOCH + 1) * EPOCH_S * 1000 - 1,
        (EPOCH + 1) * EPOCH_S * 1000,
    ):
        receipt = replace(proof.receipts[0].receipt, received_at=at)
        moved = replace(proof, receipts=(note(bench.domain, receipt),))
        assert agree(bench, moved, LIE) == (at // 1000 // EPOCH_S == EPOCH)
