"""Objective faults through Court.prove, on the twin and on the contracts: encoded, judged, punished once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from incentives import faults
from incentives.faults import Fault, Proof, SignedReceipt, SignedRoot, SignedTariff
from node.chain.court import FaultKind, encode_proof
from node.chain.errors import ContractReverted
from protocol import merkle
from protocol.eip712 import digest, hash_struct
from protocol.merkle import Entry
from protocol.messages import Commitment, Tariff, WorkReceipt
from protocol.units import BPS, ZERO_ADDRESS, Digest, FinishReason, Wei
from tests.node.chain.court_bench import PROFILE, STAKE, CourtBench, entries
from tests.node.chain.helpers import session, tariff
from tests.twins.chain_lab import LAB_OPTIONS, CourtLab


def receipt(sheet: Tariff, tariff_hash: Digest, received_s: int, **changes: object) -> WorkReceipt:
    """A receipt that charges 7 wei for nothing in particular."""
    zero: dict[str, object] = {
        name: Digest(bytes(32)) if kind == "B32" else ZERO_ADDRESS if kind == "Addr" else False if kind == "Bool" else 0
        for name, kind in WorkReceipt.__annotations__.items()
    }
    stated: dict[str, object] = {
        "provider": sheet.provider,
        "client": session(7).address,
        "job_id": Digest(b"\x42" * 32),
        "tier": 1,
        "base_bps": BPS,
        "step": 1,
        "is_final": True,
        "prompt_tokens": 4,
        "completion_tokens": 2,
        "finish_reason": int(FinishReason.STOP),
        "received_at": received_s * 1_000,
        "first_token_at": received_s * 1_000 + 5,
        "finished_at": received_s * 1_000 + 9,
        "multiplier": BPS**4,
        "total": 7,
        "tariff_hash": tariff_hash,
    }
    return WorkReceipt(**(zero | stated | changes))  # type: ignore[arg-type]


async def logged_tariff(bench: CourtBench) -> SignedTariff:
    """A sheet of the provider's for the registered profile, in force in a while."""
    start = await bench.timestamp() + LAB_OPTIONS.epoch_seconds + 30
    sheet = replace(tariff(bench.provider.address, 1, start), profile_id=hash_struct(PROFILE))
    signature = bench.provider.key.sign(bench.court.domain, sheet)
    await bench.provider.node.log_tariff(sheet, signature)
    await bench.until(start + 1)
    return SignedTariff(sheet, signature)


async def signed_receipt(bench: CourtBench, sheet: SignedTariff, **changes: object) -> SignedReceipt:
    made = receipt(sheet.tariff, digest(bench.court.domain, sheet.tariff), await bench.timestamp(), **changes)
    return SignedReceipt(made, bench.provider.key.sign(bench.court.domain, made))


async def punished(bench: CourtBench, proof: Proof, share_bps: int) -> None:
    """That the Court takes the proof, once, and the reporter has half of the bounty."""
    faults.judge(proof)
    reporter = bench.validators[0]
    before, stake = await reporter.node.token_balance(reporter.address), await bench.provider.stake()
    await reporter.court.prove(*encode_proof(proof))
    taken = stake * share_bps // BPS
    assert await bench.provider.stake() == stake - taken
    assert await reporter.node.token_balance(reporter.address) == before + taken // 10 // 2
    events, _ = await bench.court.events(0)
    [event] = [event for event in events if event.name == "FaultProven"]
    assert event.about == bench.provider.address and event.values["slashed"] == taken
    with pytest.raises(ContractReverted, match="FaultAlreadyPunished"):
        await reporter.court.prove(*encode_proof(proof))


async def test_a_charge_that_the_tariff_does_not_give(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=1)
    sheet = await logged_tariff(bench)
    note = await signed_receipt(bench, sheet)
    found = faults.charge_findings(sheet.tariff, note.receipt)
    proof = Proof(bench.court.domain, bench.provider.key.address, found[0].fault, (sheet,), (note,))
    assert encode_proof(proof)[0] == FaultKind.PRICE
    await punished(bench, proof, 1_000)


async def test_two_sheets_under_one_number(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=1)
    one = tariff(bench.provider.address, 3, 1_000)
    signed = [
        SignedTariff(sheet, bench.provider.key.sign(bench.court.domain, sheet))
        for sheet in (one, replace(one, prompt_price=2))
    ]
    await punished(
        bench, Proof(bench.court.domain, bench.provider.key.address, Fault.TWO_TARIFFS, tuple(signed)), 5_000
    )


@pytest.mark.parametrize("fault", [Fault.TWO_RECEIPTS, Fault.BROKEN_CHAIN])
async def test_receipts_that_contradict_each_other(court_lab: CourtLab, fault: Fault) -> None:
    bench = await CourtBench(court_lab).open(validators=1)
    one = tariff(bench.provider.address, 3, 1_000)
    sheet = SignedTariff(one, bench.provider.key.sign(bench.court.domain, one))
    first = await signed_receipt(bench, sheet)
    other = await signed_receipt(bench, sheet, step=1 if fault is Fault.TWO_RECEIPTS else 2, total=9)
    await punished(bench, Proof(bench.court.domain, bench.provider.key.address, fault, (), (first, other)), 5_000)


async def test_a_tree_out_of_order(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=1)
    jobs = tuple(reversed(entries(3)))
    await bench.commit(jobs=jobs)
    places = faults.out_of_order(jobs)
    assert places is not None
    root = await committed(bench, jobs)
    proof = Proof(bench.court.domain, bench.provider.key.address, Fault.UNSORTED, (), roots=(root,), placed=places)
    await punished(bench, proof, 5_000)


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_a_job_left_out_of_the_tree(court_lab: CourtLab, count: int) -> None:
    bench = await CourtBench(court_lab).open(validators=1)
    sheet = await logged_tariff(bench)
    note = await signed_receipt(bench, sheet)
    jobs = entries(count)
    epoch = faults.epoch_of(note.receipt, bench.rules.epoch_seconds)
    await bench.commit(epoch, jobs)
    places = faults.neighbours(jobs, note.receipt.job_id)  # type: ignore[arg-type]
    assert places is not None
    root = await committed(bench, jobs, epoch)
    proof = Proof(
        bench.court.domain,
        bench.provider.key.address,
        Fault.MISSING,
        (sheet,),
        (note,),
        roots=(root,),
        placed=places,
        epoch_s=bench.rules.epoch_seconds,
    )
    await punished(bench, proof, 5_000)


async def test_an_epoch_with_a_job_and_without_a_commitment(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=1)
    sheet = await logged_tariff(bench)
    note = await signed_receipt(bench, sheet)
    epoch_s = bench.rules.epoch_seconds
    parts = (bench.court.domain, bench.provider.key.address, Fault.UNCOMMITTED, (sheet,), (note,))
    proof = Proof(*parts, epoch_s=epoch_s)
    with pytest.raises(ContractReverted, match="NotProven"):
        await bench.court.prove(*encode_proof(proof))
    await bench.until((faults.epoch_of(note.receipt, epoch_s) + 1) * epoch_s + bench.rules.commit_window + 1)
    await punished(bench, proof, 1_000)


async def test_what_proves_nothing_is_refused(court_lab: CourtLab) -> None:
    bench = await CourtBench(court_lab).open(validators=1)
    one = tariff(bench.provider.address, 3, 1_000)
    signed = SignedTariff(one, bench.provider.key.sign(bench.court.domain, one))
    same = Proof(bench.court.domain, bench.provider.key.address, Fault.TWO_TARIFFS, (signed, signed))
    with pytest.raises(ContractReverted, match="NotProven"):
        await bench.court.prove(*encode_proof(same))
    forged = replace(one, prompt_price=5)
    stranger = SignedTariff(forged, session(9).sign(bench.court.domain, forged))
    with pytest.raises(ContractReverted, match="NotSignedBy"):
        await bench.court.prove(*encode_proof(replace(same, tariffs=(signed, stranger))))
    with pytest.raises(ContractReverted, match="UnknownKind"):
        await bench.court.prove(200, b"")
    assert await bench.provider.stake() == STAKE


def test_a_hidden_hit_convinces_people_only() -> None:
    with pytest.raises(ValueError, match="does not judge"):
        encode_proof(Proof(domain=None, node_key=ZERO_ADDRESS, fault=Fault.HIDDEN_HIT, tariffs=()))  # type: ignore[arg-type]


async def committed(bench: CourtBench, jobs: tuple[Entry, ...], epoch: int | None = None) -> SignedRoot:
    """The provider's commitment as it stands on chain, signed again."""
    events, _ = await bench.court.events(0)
    made = [event for event in events if event.name == "Committed"][-1]
    root = merkle.root(jobs)
    record = await bench.court.commitment(made.case_id)
    assert record is not None and record.root == root.hash
    commitment = Commitment(
        bench.provider.address,
        hash_struct(PROFILE),
        record.epoch if epoch is None else epoch,
        root.hash,
        len(jobs),
        Wei(root.total),
        record.lot,
    )
    return SignedRoot(commitment, bench.provider.key.sign(bench.court.domain, commitment))
