"""Faults of receipt chains and of committed trees: honest ones show none, each break is proved by its documents."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.audit_draw import lot_of
from incentives.fairness import charge_faults, epoch_leaves
from incentives.fault_json import decode, encode
from incentives.faults import (
    Fault,
    Placed,
    Proof,
    ProofFails,
    SignedReceipt,
    SignedRoot,
    SignedTariff,
    broken_chain,
    epoch_of,
    judge,
    neighbours,
    out_of_order,
)
from protocol import merkle
from protocol.bundle import Bundle
from protocol.merkle import Entry
from protocol.messages import Commitment, WorkReceipt
from protocol.signing import Signer
from protocol.units import Digest, JobId, Wei
from tests.incentives.trade import DOMAIN, NODE, PAYERS, START, TARIFF, WALLET, altered, last, sell
from tests.protocol.sheets import ON_SLOW_CPU

STRANGER = Signer.from_secret(b"\x42" * 32)
EPOCH_S = 3_600
SOLD = [sell(nonce=number, tokens=9, at=START // 3_600_000 * 3_600_000 + number) for number in range(7)]


def signed(*receipts: WorkReceipt, signer: Signer = NODE) -> tuple[SignedReceipt, ...]:
    return tuple(SignedReceipt(receipt, signer.sign(DOMAIN, receipt)) for receipt in receipts)


def tree(bundles: list[Bundle], **changes: Any) -> tuple[list[Entry], SignedRoot]:
    """The commitment over these jobs, signed."""
    profile_id, epoch = Digest(TARIFF.profile_id), epoch_of(last(SOLD[0]), EPOCH_S)
    entries = epoch_leaves(bundles, WALLET.address, profile_id, epoch, EPOCH_S)
    return entries, root_of(entries, **changes)


def root_of(entries: list[Entry], **changes: Any) -> SignedRoot:
    top = merkle.root(entries)
    made = Commitment(
        WALLET.address, Digest(TARIFF.profile_id), epoch_of(last(SOLD[0]), EPOCH_S), top.hash, len(entries), top.total,
        lot_of(b"secret"),
    )  # fmt: skip
    made = replace(made, **changes)
    return SignedRoot(made, NODE.sign(DOMAIN, made))


def absent(job: Bundle, root: SignedRoot, around: tuple[Placed, ...], **changes: Any) -> Proof:
    made = Proof(
        DOMAIN, NODE.address, Fault.MISSING, (SignedTariff(TARIFF, NODE.sign(DOMAIN, TARIFF)),), signed(last(job)),
        (), (root,), around, EPOCH_S,
    )  # fmt: skip
    return replace(made, **changes)


def fails(proof: Proof) -> None:
    with pytest.raises(ProofFails):
        judge(proof)


# -------------------------------------------------------------------------------------------------------------- chains


@pytest.mark.parametrize("tokens", [1, 33, 100])
def test_an_honest_chain_shows_no_break(tokens: int) -> None:
    receipts = [notch.receipt for notch in sell(tokens=tokens, tpot_ms=900).notches]
    assert not any(broken_chain(DOMAIN, *pair) for pair in combinations(receipts, 2))
    assert charge_faults([sell(tokens=tokens)]) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"previous": Digest(b"\7" * 32)},
        {"prompt_tokens": 99},
        {"completion_tokens": 31},
        {"ste_micro": 0},
        {"total": 1},
    ],
)
def test_each_break_is_proved(changes: dict[str, Any]) -> None:
    earlier, later = (notch.receipt for notch in sell(tokens=40).notches)
    bent = replace(later, **changes)
    found = broken_chain(DOMAIN, earlier, bent)
    assert found is not None and found.fault is Fault.BROKEN_CHAIN
    proof = Proof(DOMAIN, NODE.address, Fault.BROKEN_CHAIN, (), signed(earlier, bent))
    assert judge(decode(encode(proof))) == found
    fails(replace(proof, receipts=signed(bent, earlier)))
    fails(replace(proof, receipts=signed(earlier, later)))
    fails(replace(proof, receipts=signed(earlier, bent, signer=STRANGER)))
    fails(replace(proof, receipts=signed(earlier, replace(bent, job_id=JobId(b"\7" * 32)))))
    fails(replace(proof, fault=Fault.TWO_RECEIPTS))


def test_nothing_follows_a_final_receipt() -> None:
    *_, final = (notch.receipt for notch in sell(tokens=40).notches)
    after = replace(final, step=final.step + 2)
    found = broken_chain(DOMAIN, final, after)
    assert found is not None and "final" in found.detail


def test_a_refund_may_lower_the_total() -> None:
    earlier, later = (notch.receipt for notch in sell(tokens=40).notches)
    assert broken_chain(DOMAIN, earlier, replace(later, total=1, refund=5)) is None


def test_a_broken_chain_is_found_among_bundles_of_both_sides() -> None:
    whole = sell(tokens=70)
    bent = altered(whole, previous=Digest(b"\7" * 32))
    ours, theirs = replace(whole, notches=whole.notches[:2]), replace(bent, notches=bent.notches[2:])
    (found,) = charge_faults([ours, theirs])
    assert found.finding.fault is Fault.BROKEN_CHAIN and found.proof is not None
    assert judge(found.proof) == found.finding


# --------------------------------------------------------------------------------------------------------------- trees


@pytest.mark.parametrize("left_out", range(7))
def test_a_job_left_out_is_proved_missing_wherever_it_belongs(left_out: int) -> None:
    job = sorted(SOLD, key=lambda bundle: bundle.job_id)[left_out]
    entries, root = tree([bundle for bundle in SOLD if bundle is not job])
    around = neighbours(entries, job.job_id)
    assert around is not None and len(around) == (1 if left_out in (0, 6) else 2)
    proof = absent(job, root, around)
    assert judge(decode(encode(proof))).fault is Fault.MISSING
    for index in range(len(around)):
        fails(replace(proof, placed=around[:index] + around[index + 1 :]))
    fails(replace(proof, placed=around[::-1]) if len(around) == 2 else replace(proof, placed=around * 2))
    fails(replace(proof, epoch_s=EPOCH_S * 2))
    fails(replace(proof, epoch_s=0))


def test_a_tree_of_nothing_misses_everything() -> None:
    entries, root = tree([])
    assert neighbours(entries, SOLD[0].job_id) == ()
    assert judge(absent(SOLD[0], root, ())).fault is Fault.MISSING


def test_a_job_that_is_there_cannot_be_proved_missing() -> None:
    """Whatever entries a liar shows, the honest tree leaves no room for the job."""
    entries, root = tree(SOLD)
    placed = [Placed(entry, index, merkle.prove(entries, index)) for index, entry in enumerate(entries)]
    for job in SOLD:
        assert neighbours(entries, job.job_id) is None
        for around in [(), *((item,) for item in placed), *combinations(placed, 2)]:
            fails(absent(job, root, tuple(around)))


def test_a_job_of_another_epoch_profile_or_provider_is_not_missing() -> None:
    job, *rest = sorted(SOLD, key=lambda bundle: bundle.job_id)
    entries, root = tree(rest)
    around = neighbours(entries, job.job_id)
    assert around is not None
    for changes in ({"epoch": root.commitment.epoch + 1}, {"profile_id": Digest(b"\7" * 32)}):
        fails(absent(job, root_of(entries, **changes), around))
    fails(absent(job, root_of(entries, provider=PAYERS[0].address), around))
    unsigned = replace(root, signature=STRANGER.sign(DOMAIN, root.commitment))
    fails(absent(job, unsigned, around))
    other = sell(tariff=replace(TARIFF, sequence=9), nonce=0, tokens=9, at=last(job).received_at)
    fails(absent(other, root, around))


def test_entries_out_of_order_are_proved() -> None:
    entries, _ = tree(SOLD)
    assert out_of_order(entries) is None
    swapped = [*entries[:2], entries[3], entries[2], *entries[4:]]
    root, pair = root_of(swapped), out_of_order(swapped)
    assert pair is not None and [item.index for item in pair] == [2, 3]
    proof = Proof(DOMAIN, NODE.address, Fault.UNSORTED, (), (), (), (root,), pair)
    assert judge(decode(encode(proof))).fault is Fault.UNSORTED
    fails(replace(proof, placed=pair[::-1]))
    fails(replace(proof, placed=pair[:1]))
    fails(replace(proof, roots=(tree(SOLD)[1],)))
    twice = [entries[0], replace(entries[0], amount=Wei(1)), *entries[1:]]
    doubled = out_of_order(twice)
    assert doubled is not None
    assert judge(replace(proof, roots=(root_of(twice),), placed=doubled)).fault is Fault.UNSORTED


@ON_SLOW_CPU
@given(st.integers(0, 6), st.integers(0, 6))
def test_no_two_entries_of_an_honest_tree_prove_disorder(one: int, other: int) -> None:
    entries, root = tree(SOLD)
    pair = tuple(Placed(entries[index], index, merkle.prove(entries, index)) for index in (one, other))
    fails(Proof(DOMAIN, NODE.address, Fault.UNSORTED, (), (), (), (root,), pair))
    moved = (replace(pair[0], index=one + 1), pair[1])
    fails(Proof(DOMAIN, NODE.address, Fault.UNSORTED, (), (), (), (root,), moved))


def test_a_signed_job_makes_a_commitment_due() -> None:
    tariffs = (SignedTariff(TARIFF, NODE.sign(DOMAIN, TARIFF)),)
    proof = Proof(
        DOMAIN, NODE.address, Fault.UNCOMMITTED, tariffs, signed(last(SOLD[0])), (), (), (), EPOCH_S
    )  # fmt: skip
    found = judge(decode(encode(proof)))
    assert f"epoch {epoch_of(last(SOLD[0]), EPOCH_S)}" in found.detail
    fails(replace(proof, epoch_s=0))
    fails(replace(proof, tariffs=()))
    fails(replace(proof, receipts=signed(last(SOLD[0]), signer=STRANGER)))
