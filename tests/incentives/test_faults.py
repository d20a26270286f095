"""Proofs against a provider: honest receipts show nothing, tampered charges do, and only what it signed counts."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from incentives.fault_json import decode, encode
from incentives.faults import (
    Fault,
    Proof,
    ProofFails,
    SignedReceipt,
    SignedTariff,
    charge_findings,
    hidden_hit,
    judge,
    overcharged,
    two_receipts,
    two_tariffs,
)
from protocol.bundle_json import MalformedBundle
from protocol.cache import BLOCK_TOKENS, block_digests, block_heads, prompt_head
from protocol.eip712 import digest
from protocol.messages import Tariff, WorkReceipt
from protocol.signing import Signer
from protocol.tariff import Cost
from protocol.units import BPS, MAX_AMOUNT, ZERO_DIGEST, Digest, FinishReason, Tier
from protocol.work import check_receipt
from tests.protocol.jobs import DOMAIN, REQUEST, SALT, START, Job, jobs, play
from tests.protocol.sheets import ON_SLOW_CPU, SHEET, tariffs

NODE = Signer.from_secret(b"\x41" * 32)
STRANGER = Signer.from_secret(b"\x42" * 32)

sheets = tariffs().map(lambda sheet: replace(sheet, provider=REQUEST.provider, valid_from=0, valid_until=1 << 40))


def receipts_of(job: Job) -> list[WorkReceipt]:
    """Every receipt of the job, under the hash of its own tariff."""
    named = replace(job, request=replace(job.request, tariff_hash=digest(DOMAIN, job.tariff)))
    out, steps = [], play(named)
    stage = next(steps, None)
    while stage is not None:
        out.append(stage.receipt)
        try:
            stage = steps.send(check_receipt(DOMAIN, stage.client, stage.receipt, stage.now_ms)[0])
        except StopIteration:
            stage = None
    return out


def one(tariff: Tariff = SHEET, **changes: int) -> tuple[Tariff, WorkReceipt]:
    """An honest final receipt under `tariff`, then changed."""
    sheet = replace(tariff, provider=REQUEST.provider, valid_from=0, valid_until=1 << 40)
    job = Job(REQUEST, sheet, 0, (), FinishReason.STOP, 0, 0)  # type: ignore[arg-type]
    return sheet, replace(receipts_of(job)[-1], **changes)


def proof(fault: Fault, tariff: Tariff, *receipts: WorkReceipt, signer: Signer = NODE) -> Proof:
    return Proof(
        DOMAIN,
        NODE.address,
        fault,
        (SignedTariff(tariff, signer.sign(DOMAIN, tariff)),),
        tuple(SignedReceipt(receipt, signer.sign(DOMAIN, receipt)) for receipt in receipts),
    )


@ON_SLOW_CPU
@given(jobs(sheets))
def test_honest_receipts_show_nothing(job: Job) -> None:
    for receipt in receipts_of(job):
        assert charge_findings(job.tariff, receipt) == ()


@ON_SLOW_CPU
@given(jobs(sheets), st.sampled_from([item.name for item in fields(Cost)]), st.integers(1, 10**6), st.booleans())
def test_any_changed_line_is_found_and_proved(job: Job, name: str, by: int, more: bool) -> None:
    honest = receipts_of(job)[-1]
    value = getattr(honest, name) + (by if more else -by)
    bound = MAX_AMOUNT if name != "multiplier" else (1 << 64) - 1
    assume(0 <= value <= bound)
    wrong = replace(honest, **{name: value})
    (found,) = charge_findings(job.tariff, wrong)
    expected = Fault.MISPRICED if name != "total" else Fault.OVERCHARGE if more else Fault.UNDERCHARGE
    assert found.fault is expected
    assert found.excess == wrong.total - honest.total
    made = proof(found.fault, job.tariff, wrong)
    assert judge(decode(encode(made))) == found
    with pytest.raises(ProofFails):
        judge(proof(found.fault, job.tariff, honest))


@pytest.mark.parametrize(
    ("sheet", "changes", "fault"),
    [
        ({"standard_bps": 0}, {}, Fault.TIER_NOT_OFFERED),
        ({}, {"base_bps": 20_001}, Fault.BASE_OUT_OF_BOUNDS),
        ({}, {"base_bps": 9_999}, Fault.BASE_OUT_OF_BOUNDS),
        ({}, {"reservation": b"\x01" * 32}, Fault.BASE_OUT_OF_BOUNDS),
        ({}, {"tier": 3}, Fault.IMPOSSIBLE),
        ({}, {"kind": 9}, Fault.IMPOSSIBLE),
        ({}, {"kind": 2}, Fault.IMPOSSIBLE),
        ({}, {"cached_tokens": 101}, Fault.IMPOSSIBLE),
        ({}, {"reasoning_tokens": 1}, Fault.IMPOSSIBLE),
        ({}, {"tier": Tier.FLEX}, Fault.OVERCHARGE),
        ({}, {"received_at": (1 << 40) * 1000}, Fault.OUT_OF_FORCE),
    ],
)
def test_what_the_tariff_never_sold(sheet: dict[str, int], changes: dict[str, int], fault: Fault) -> None:
    tariff, receipt = one(replace(SHEET, **{"standard_refund_bps": 0}), **changes)
    # A receipt cannot be built under a tier that is not offered, so the tier is taken away afterwards.
    tariff = replace(tariff, **sheet)
    receipt = replace(receipt, tariff_hash=digest(DOMAIN, tariff))
    found = charge_findings(tariff, receipt)
    assert [item.fault for item in found] == [fault]
    assert judge(proof(fault, tariff, receipt)).fault is fault


def test_a_reserved_job_is_priced_at_the_discount_and_nothing_else() -> None:
    tariff, receipt = one()
    reserved = replace(receipt, reservation=Digest(b"\x01" * 32), base_bps=BPS - tariff.reserved_discount_bps)
    assert [item.fault for item in charge_findings(tariff, reserved)] == [Fault.OVERCHARGE]


def test_both_edges_of_the_window() -> None:
    tariff, receipt = one()
    edges = replace(tariff, valid_from=START // 1000, valid_until=START // 1000 + 1)
    assert charge_findings(edges, receipt) == ()
    for valid_from, valid_until in ((START // 1000 + 1, START // 1000 + 9), (1, START // 1000)):
        sheet = replace(tariff, valid_from=valid_from, valid_until=valid_until)
        assert [item.fault for item in charge_findings(sheet, receipt)] == [Fault.OUT_OF_FORCE]


def test_two_sheets_under_one_sequence() -> None:
    first = replace(SHEET, provider=REQUEST.provider)
    second = replace(first, prompt_price=first.prompt_price + 1)
    made = Proof(
        DOMAIN,
        NODE.address,
        Fault.TWO_TARIFFS,
        tuple(SignedTariff(sheet, NODE.sign(DOMAIN, sheet)) for sheet in (first, second)),
    )
    assert judge(decode(encode(made))).fault is Fault.TWO_TARIFFS
    for other in (first, replace(second, sequence=2), replace(second, profile_id=Digest(b"\x01" * 32))):
        assert two_tariffs(DOMAIN, first, other) is None


def test_two_receipts_of_one_step() -> None:
    _, receipt = one()
    other = replace(receipt, total=receipt.total + 5)
    found = two_receipts(DOMAIN, receipt, other)
    assert found is not None and found.excess == 5
    assert two_receipts(DOMAIN, receipt, receipt) is None
    assert two_receipts(DOMAIN, receipt, replace(other, step=receipt.step + 1)) is None
    signed = tuple(SignedReceipt(item, NODE.sign(DOMAIN, item)) for item in (receipt, other))
    assert judge(Proof(DOMAIN, NODE.address, Fault.TWO_RECEIPTS, (), signed)) == found


def hits(prompt: int = 100, cached: int = 0) -> tuple[Tariff, WorkReceipt, WorkReceipt, tuple[Digest, ...]]:
    """A prompt that is kept, then a longer one that begins with it, and the digests between."""
    tariff, receipt = one()
    ids = range(prompt + 70)
    heads = block_heads(SALT, ids[:prompt])
    kept = replace(
        receipt, prompt_tokens=prompt, prompt_head=prompt_head(heads), is_kept=True, finished_at=START + 1_000
    )
    later = replace(
        receipt,
        job_id=Digest(b"\x99" * 32),
        prompt_tokens=prompt + 70,
        cached_tokens=cached,
        completion_tokens=10,
        prompt_head=prompt_head(block_heads(SALT, ids)),
        received_at=START + 2_000,
    )
    return tariff, kept, later, block_digests(SALT, ids)[prompt // BLOCK_TOKENS :]


def test_a_hidden_cache_hit_is_proved_from_two_receipts() -> None:
    tariff, kept, later, between = hits()
    found = hidden_hit(kept, later, tariff, between)
    assert found is not None and "96 tokens" in found.detail
    made = replace(proof(Fault.HIDDEN_HIT, tariff, kept, later), between=between)
    assert judge(decode(encode(made))) == found
    assert hidden_hit(kept, replace(later, cached_tokens=96), tariff, between) is None
    assert hidden_hit(kept, replace(later, completion_tokens=0), tariff, between) is None
    assert hidden_hit(kept, later, replace(tariff, cache_ttl_s=0), between) is None
    assert hidden_hit(kept, later, tariff, between[1:]) is None
    assert hidden_hit(replace(kept, is_kept=False), later, tariff, between) is None


def test_only_the_accused_own_signature_counts() -> None:
    tariff, receipt = one()
    wrong = replace(receipt, total=receipt.total + 1)
    made = proof(Fault.OVERCHARGE, tariff, wrong)
    assert judge(made).excess == 1
    with pytest.raises(ProofFails, match="signature"):
        judge(proof(Fault.OVERCHARGE, tariff, wrong, signer=STRANGER))
    for forged in (
        replace(made, receipts=(SignedReceipt(wrong, STRANGER.sign(DOMAIN, wrong)),)),
        replace(made, receipts=(SignedReceipt(replace(wrong, total=wrong.total + 1), made.receipts[0].signature),)),
        replace(made, tariffs=(SignedTariff(tariff, b""),)),
        replace(made, tariffs=()),
        replace(made, receipts=()),
        replace(made, fault=Fault.UNDERCHARGE),
        replace(made, node_key=STRANGER.address),
    ):
        with pytest.raises(ProofFails):
            judge(forged)


def test_a_receipt_is_judged_under_the_tariff_it_names() -> None:
    tariff, receipt = one()
    cheaper = replace(tariff, sequence=9, per_request=0)
    assert charge_findings(cheaper, receipt)
    with pytest.raises(ProofFails, match="another tariff"):
        judge(proof(Fault.OVERCHARGE, cheaper, receipt))
    elsewhere = replace(receipt, provider=STRANGER.address, total=receipt.total + 1)
    with pytest.raises(ProofFails, match="different providers"):
        judge(proof(Fault.OVERCHARGE, tariff, elsewhere))


def test_only_what_is_charged_above_adds_up() -> None:
    tariff, receipt = one()
    found = [item for by in (5, -3, 7) for item in charge_findings(tariff, replace(receipt, total=receipt.total + by))]
    assert overcharged(tuple(found)) == 12


@pytest.mark.parametrize(
    "change",
    [
        ('"overcharge"', '"theft"'),
        ('"tallystick-fault/2"', '"tallystick-fault/1"'),
        ('"placed": []', '"placed": [{}]'),
        ('"epoch_seconds": 0', '"epoch_seconds": -1'),
        ('"between": []', '"between": ["0x00"]'),
        ('"between": []', '"between": [], "note": ""'),
        ('"node_key": "0x', '"node_key": "'),
    ],
)
def test_a_text_that_is_no_proof_is_refused(change: tuple[str, str]) -> None:
    tariff, receipt = one()
    text = encode(proof(Fault.OVERCHARGE, tariff, replace(receipt, total=receipt.total + 1)))
    assert change[0] in text
    with pytest.raises(MalformedBundle):
        decode(text.replace(*change))


def test_prompt_heads_of_a_prompt_without_blocks_prove_nothing() -> None:
    tariff, kept, later, _ = hits()
    bare = replace(kept, prompt_head=ZERO_DIGEST)
    assert hidden_hit(bare, replace(later, prompt_head=ZERO_DIGEST), tariff) is None
