"""An audit of whole jobs: nothing is found in honest ones, everything that was tampered with is, and books add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.fairness import (
    below_cost,
    channel_books,
    charge_faults,
    commitment_gap,
    entry_of,
    epoch_leaves,
    unjudged,
)
from incentives.faults import Fault, epoch_of, judge
from incentives.ledger import ChannelKey
from protocol import merkle
from protocol.bundle import Bundle, passed, verify
from protocol.eip712 import digest
from protocol.messages import Commitment
from protocol.units import ZERO_DIGEST, Address, Digest, Wei
from tests.incentives.trade import (
    DOMAIN,
    NODE,
    PAYERS,
    START,
    TARIFF,
    WALLET,
    altered,
    channel,
    last,
    sell,
)
from tests.protocol.sheets import ON_SLOW_CPU

EPOCH_S = 60


def test_the_jobs_made_here_are_honest() -> None:
    assert all(passed(verify(bundle)) for bundle in channel(2))


@ON_SLOW_CPU
@given(
    st.lists(
        st.tuples(st.integers(1, 70), st.integers(1, 300), st.integers(0, 3_000), st.sampled_from([0, 1, 2])),
        min_size=1,
        max_size=3,
    )
)
def test_honest_jobs_show_nothing(rows: list[tuple[int, int, int, int]]) -> None:
    bundles = [
        sell(tokens=tokens, prompt=prompt, ttft_ms=ttft, tier=tier, nonce=number)
        for number, (tokens, prompt, ttft, tier) in enumerate(rows)
    ]
    assert charge_faults(bundles) == [] and unjudged(bundles) == 0


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"total": 1}, Fault.UNDERCHARGE),
        ({"total": 10**20}, Fault.OVERCHARGE),
        ({"completion_line": 1}, Fault.MISPRICED),
        ({"base_bps": 50_000}, Fault.BASE_OUT_OF_BOUNDS),
        ({"tier": 9}, Fault.IMPOSSIBLE),
        ({"received_at": (1 << 40) * 1000}, Fault.OUT_OF_FORCE),
    ],
)
def test_a_tampered_job_is_found_among_honest_ones_and_proved(changes: dict[str, int], fault: Fault) -> None:
    bundles = channel(2)
    bad = altered(sell(payer=PAYERS[1], nonce=9), **changes)
    found = charge_faults([*bundles, bad])
    hit = next(item for item in found if item.finding.fault is fault)
    assert hit.job_id == bad.job_id and hit.receipt == bad.notches[-1].digest
    assert hit.proof is not None and judge(hit.proof) == hit.finding
    assert all(item.job_id == bad.job_id for item in found)


def test_of_one_kind_in_one_job_the_last_is_told() -> None:
    bundle = sell(tokens=70)
    notches = tuple(
        replace(notch, receipt=(wrong := replace(notch.receipt, total=notch.receipt.total + step)),
                digest=digest(DOMAIN, wrong), receipt_signature=NODE.sign(DOMAIN, wrong))
        for step, notch in enumerate(bundle.notches, start=1)
    )  # fmt: skip
    found, broken = charge_faults([replace(bundle, notches=notches)])
    assert found.finding.excess == len(notches) == 3
    assert broken.finding.fault is Fault.BROKEN_CHAIN
    assert broken.proof is not None and judge(broken.proof) == broken.finding


def test_without_signatures_a_fault_is_told_and_not_proved() -> None:
    bundle = altered(sell(tokens=9), total=1)
    bare = replace(bundle, notches=tuple(replace(notch, receipt_signature=b"") for notch in bundle.notches))
    (found,) = charge_faults([bare])
    assert found.finding.fault is Fault.UNDERCHARGE and found.proof is None
    (signed,) = [item for item in charge_faults([bare, bundle]) if item.proof]
    assert signed.receipt == found.receipt


def test_the_tariff_is_taken_from_whichever_job_has_it() -> None:
    first, second = channel(2, tokens=9)
    lacking = replace(altered(second, total=1), tariff=None, tariff_signature=b"")
    assert charge_faults([lacking]) == [] and unjudged([lacking]) == len(lacking.notches)
    (found,) = charge_faults([first, lacking])
    assert found.finding.fault is Fault.UNDERCHARGE and unjudged([first, lacking]) == 0


def test_two_sheets_under_one_sequence_number_are_found() -> None:
    other = replace(TARIFF, prompt_price=TARIFF.prompt_price + 1)
    found = charge_faults([sell(nonce=1), sell(nonce=2, tariff=other), sell(nonce=3, tariff=other)])
    assert [item.finding.fault for item in found] == [Fault.TWO_TARIFFS]
    assert found[0].proof is not None and judge(found[0].proof).fault is Fault.TWO_TARIFFS


def test_two_receipts_of_one_step_are_found() -> None:
    bundle = sell()
    doubled = altered(bundle, waited_ms=1)
    (found,) = charge_faults([bundle, doubled])
    assert found.finding.fault is Fault.TWO_RECEIPTS
    assert found.proof is not None and judge(found.proof).fault is Fault.TWO_RECEIPTS
    assert charge_faults([bundle, bundle]) == []


def test_a_hidden_hit_on_the_same_prompt_is_found() -> None:
    kept, missed = sell(kept=True), sell(at=START + 60_000, nonce=1)
    (found,) = charge_faults([missed, kept])
    assert found.finding.fault is Fault.HIDDEN_HIT and found.job_id == missed.job_id
    assert found.proof is not None and judge(found.proof) == found.finding
    assert charge_faults([kept, sell(at=START + 60_000, nonce=1, cached=96)]) == []
    assert charge_faults([kept, sell(at=START + 60_000, nonce=1, payer=PAYERS[1])]) == []
    assert charge_faults([kept, sell(at=START + 10_000_000, nonce=1)]) == []


# -------------------------------------------------------------------------------------------------------- completeness


def key_of(bundle: Bundle) -> ChannelKey:
    return ChannelKey(Address(bundle.request.provider), Address(bundle.request.client))


def test_the_books_of_a_whole_channel_close() -> None:
    bundles = channel(3)
    total = sum(last(bundle).total for bundle in bundles)
    (books,) = channel_books(bundles, {key_of(bundles[0]): Wei(total)})
    assert (books.jobs, books.receipted, books.vouched, books.unsettled) == (3, total, total, 0)
    assert books.missing == books.uncovered == books.overclaimed == books.unacknowledged == 0


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_receipt_left_out_is_missed(left_out: int) -> None:
    bundles = channel(3)
    rest = [bundle for number, bundle in enumerate(bundles) if number != left_out]
    (books,) = channel_books(rest, {})
    assert books.missing == last(bundles[left_out]).total > 0 and books.claimed is None


def test_a_refund_is_no_missing_receipt() -> None:
    slow = channel(2, tpot_ms=900, tokens=70)
    assert last(slow[0]).refund > 0
    (books,) = channel_books(slow, {})
    assert books.missing == books.uncovered == 0 and books.peak >= books.vouched >= books.receipted


def test_what_no_voucher_covers_and_what_was_claimed_beyond() -> None:
    bundle = sell()
    bare = replace(bundle, notches=tuple(replace(notch, voucher=None) for notch in bundle.notches))
    (books,) = channel_books([bare], {key_of(bundle): Wei(7)})
    assert (books.receipted, books.unacknowledged, books.overclaimed) == (0, last(bundle).total, 7)
    small = replace(bundle.notches[-1].voucher, cumulative=1)  # type: ignore[type-var]
    (books,) = channel_books([replace(bundle, notches=(replace(bundle.notches[-1], voucher=small),))], {})
    assert books.uncovered == last(bundle).total - 1


@given(st.permutations(range(4)))
def test_books_do_not_depend_on_order_or_repetition(order: list[int]) -> None:
    bundles = [*channel(2), *channel(2, payer=PAYERS[1])]
    assert channel_books([bundles[i] for i in order] + bundles, {}) == channel_books(bundles, {})


PROFILE_ID = Digest(TARIFF.profile_id)


def committed(bundles: list[Bundle], epoch: int) -> Commitment:
    entries = epoch_leaves(bundles, WALLET.address, PROFILE_ID, epoch, EPOCH_S)
    root = merkle.root(entries)
    return Commitment(WALLET.address, PROFILE_ID, epoch, root.hash, len(entries), root.total, ZERO_DIGEST)


def test_an_epochs_root_closes_on_exactly_its_jobs() -> None:
    bundles = channel(5)
    epoch = epoch_of(last(bundles[1]), EPOCH_S)
    stated = committed(bundles, epoch)
    assert 0 < stated.count < 5
    assert commitment_gap(stated, bundles * 2, EPOCH_S).closed
    inside = [bundle for bundle in bundles if epoch_of(last(bundle), EPOCH_S) == epoch]
    short = commitment_gap(stated, inside[1:], EPOCH_S)
    assert (short.count, short.total) == (-1, -last(inside[0]).total) and not short.closed
    extra = sell(payer=PAYERS[2], nonce=77, at=last(inside[0]).received_at)
    more = commitment_gap(stated, [*bundles, extra], EPOCH_S)
    assert (more.count, more.total) == (1, last(extra).total) and not more.closed


def test_a_job_belongs_to_the_epoch_it_was_received_in() -> None:
    late = sell(at=START // 60_000 * 60_000 + 59_999, tokens=70)
    assert last(late).finished_at // 60_000 > last(late).received_at // 60_000
    own = epoch_of(last(late), EPOCH_S)
    assert committed([late], own).count == 1 and committed([late], own + 1).count == 0


def test_another_profile_is_another_tree() -> None:
    (bundle,) = channel(1)
    epoch = epoch_of(last(bundle), EPOCH_S)
    other = sell(tariff=replace(TARIFF, profile_id=Digest(b"\7" * 32)), nonce=5)
    assert epoch_of(last(other), EPOCH_S) == epoch
    assert committed([bundle, other], epoch) == committed([bundle], epoch)


def test_a_job_stands_with_its_last_acknowledged_receipt() -> None:
    bundle = sell(tokens=70)
    epoch = epoch_of(last(bundle), EPOCH_S)
    *paid, final = bundle.notches
    unpaid = replace(bundle, notches=(*paid, replace(final, voucher=None)))
    (entry,) = epoch_leaves([unpaid], WALLET.address, PROFILE_ID, epoch, EPOCH_S)
    assert (entry.job_id, entry.receipt, entry.amount) == (bundle.job_id, paid[-1].digest, paid[-1].receipt.total)
    bare = replace(bundle, notches=tuple(replace(notch, voucher=None) for notch in bundle.notches))
    (entry,) = epoch_leaves([bare], WALLET.address, PROFILE_ID, epoch, EPOCH_S)
    assert entry.receipt == final.digest
    (entry,) = epoch_leaves([bare, bundle, unpaid], WALLET.address, PROFILE_ID, epoch, EPOCH_S)
    assert entry.receipt == final.digest
    assert epoch_leaves([replace(bundle, notches=())], WALLET.address, PROFILE_ID, epoch, EPOCH_S) == []
    assert entry_of([]) is None


def test_an_exchanged_receipt_changes_the_root_alone() -> None:
    bundles = channel(1)
    epoch = epoch_of(last(bundles[0]), EPOCH_S)
    gap = commitment_gap(committed(bundles, epoch), [altered(bundles[0], waited_ms=1)], EPOCH_S)
    assert (gap.count, gap.total, gap.closed) == (0, 0, False)


# ----------------------------------------------------------------------------------------------------------- predation


def test_sales_below_declared_cost_are_flagged_to_the_wei() -> None:
    bundles = channel(2)
    sold = [(TARIFF, last(bundle)) for bundle in bundles]
    ste, revenue = (sum(getattr(last(b), name) for b in bundles) for name in ("ste_micro", "total"))
    key = (Address(TARIFF.provider), Digest(TARIFF.profile_id))
    even = revenue * 1_000_000 // ste
    (fair,) = below_cost(sold, {key: Wei(even)})
    assert (fair.jobs, fair.ste_micro, fair.revenue, fair.flagged) == (2, ste, revenue, False)
    (sunk,) = below_cost(sold, {key: Wei(even + 1)})
    assert sunk.flagged and sunk.cost == -(-ste * (even + 1) // 1_000_000)
    assert below_cost(sold, {}) == []
