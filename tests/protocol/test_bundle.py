"""A bundle proves what it says: honest jobs pass every check, and no field can be changed without one failing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.bundle import Bundle, Outcome, passed, verify
from protocol.bundle_json import MalformedBundle, decode, encode
from protocol.eip712 import digest
from protocol.messages import WorkReceipt
from protocol.metering import Usage, flops, ste_micro_up
from protocol.options import NO_OPTIONS, JobOptions, Syntax, encode_options
from protocol.tariff import Cost, Timing, basis_of, cost_up
from protocol.units import ZERO_DIGEST, Digest, FinishReason, JobKind
from tests.node.cli.sticks import EMBEDDING, EXPERTS, NODE, PROFILE, SESSION, Recipe, make_bundle

GOOD = make_bundle()
TREE = json.loads(encode(GOOD))


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values that are no containers."""
    if isinstance(tree, dict):
        return [leaf for name, value in tree.items() for leaf in leaves(value, (*path, name))]
    if isinstance(tree, list):
        return [leaf for index, value in enumerate(tree) for leaf in leaves(value, (*path, index))]
    return [path]


PROVABLE = [path for path in leaves(TREE) if "token_ids" not in path and path[0] != "format"]


def failing(bundle: Bundle) -> list[str]:
    return [check.name for check in verify(bundle) if check.outcome is Outcome.FAIL]


def changed(value: Any, bit: int) -> Any:
    """The same kind of value, one bit apart; only the low ones of a number, so that it stays in its type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value ^ (1 << bit % 8)
    if not value.startswith("0x"):
        return str(int(value) ^ (1 << bit % 16))
    raw = bytearray.fromhex(value[2:])
    if not raw:
        return "0x" + "ab" * 65  # an acknowledgement of a receipt that needs none
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    return "0x" + raw.hex()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(completion_tokens=0, finish=FinishReason.CANCELLED),
        Recipe(completion_tokens=64, max_tokens=64, finish=FinishReason.LENGTH),
        Recipe(completion_tokens=33, tier=2, private=True, cached_tokens=0, salted=False, kept=False),
        Recipe(completion_tokens=10, tier=0, finish=FinishReason.DEADLINE),
        Recipe(prompt_tokens=1001, completion_tokens=96, cached_tokens=992),
        Recipe(prompt_tokens=64, cached_tokens=32, kept=False),
        Recipe(prompt_tokens=31, cached_tokens=0),
        Recipe(base_bps=12_345),
        Recipe(reserved=True),
        Recipe(kind=JobKind.BATCH, tier=0),
        Recipe(options=JobOptions(syntax=Syntax.JSON_SCHEMA, grammar='{"type": "object"}', reasoning_open=True)),
        Recipe(profile=EXPERTS),
        Recipe(profile=replace(PROFILE, window=16, reasoning_start=0, reasoning_end=0)),
        EMBEDDING,
        replace(EMBEDDING, vectors=1, finish=FinishReason.CANCELLED),
        replace(EMBEDDING, vectors=0, finish=FinishReason.DEADLINE),
    ],
)
def test_an_honest_job_passes_every_check(recipe: Recipe) -> None:
    checks = verify(make_bundle(recipe))
    assert passed(checks), checks
    skipped = {check.name for check in checks if check.outcome is Outcome.SKIP}
    assert skipped == ({"token ids"} if recipe.completion_tokens == 0 else set())


def test_json_gives_the_same_bundle_back() -> None:
    assert decode(encode(GOOD)) == GOOD
    bare = replace(GOOD, tariff=None, tariff_signature=b"", profile=None, options=b"", notches=())
    assert decode(encode(bare)) == bare


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(PROVABLE), bit=st.integers(0, 8 * 65))
def test_any_changed_field_fails_a_check(path: tuple[Any, ...], bit: int) -> None:
    tree = json.loads(json.dumps(TREE))
    at = tree
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = changed(at[path[-1]], bit)
    try:
        bundle = decode(json.dumps(tree))
    except MalformedBundle:
        return
    assert failing(bundle), f"{path} could be changed"


def test_every_field_is_covered_once() -> None:
    """The property above samples; this walks them all, one bit each."""
    for path in PROVABLE:
        tree = json.loads(json.dumps(TREE))
        at = tree
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = changed(at[path[-1]], 3)
        assert failing(decode(json.dumps(tree))), f"{path} could be changed"


def test_a_missing_half_is_skipped_and_not_passed_off_as_checked() -> None:
    halves = tuple(replace(n, receipt_signature=b"", voucher_signature=b"", ack_signature=b"") for n in GOOD.notches)
    outcome = {check.name: check.outcome for check in verify(replace(GOOD, notches=halves, tariff=None, profile=None))}
    for name in ("receipt signatures", "vouchers", "acknowledgement", "tariff", "cost", "work"):
        assert outcome[name] is Outcome.SKIP
    assert outcome["step chain"] is Outcome.OK


def resigned(bundle: Bundle, index: int, **changes: Any) -> Bundle:
    """With a receipt that a dishonest provider changed and signed again, the later ones left as they are."""
    notch = bundle.notches[index]
    receipt = replace(notch.receipt, **changes)
    fresh = replace(
        notch,
        receipt=receipt,
        digest=digest(bundle.domain, receipt),
        receipt_signature=NODE.sign(bundle.domain, receipt),
        ack_signature=b"",
    )
    return replace(bundle, notches=(*bundle.notches[:index], fresh, *bundle.notches[index + 1 :]))


FINAL = GOOD.notches[-1].receipt
OTHER = Digest(b"\x5a" * 32)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"total": FINAL.total + 1}, "cost"),
        ({"completion_tokens": 71}, "cost"),
        ({"refund": 1}, "cost"),
        ({"finish_reason": int(FinishReason.LENGTH)}, "counts"),
        ({"finish_reason": 99}, "step chain"),
        ({"is_final": False}, "step chain"),
        ({"cached_tokens": 71}, "counts"),  # more than the prompt
        ({"cached_tokens": 0}, "counts"),  # said otherwise before
        ({"cache_head": ZERO_DIGEST}, "counts"),
        ({"cache_head": OTHER}, "counts"),
        ({"prompt_head": ZERO_DIGEST}, "counts"),
        ({"prompt_head": OTHER}, "counts"),
        ({"is_kept": False}, "counts"),
        ({"first_token_at": 1}, "times"),
        ({"leaves_root": GOOD.notches[-2].receipt.leaves_root}, "counts"),
        ({"routing_root": OTHER}, "work"),  # a dense model has no experts to record
        ({"step": 4}, "step chain"),
        ({"previous": Digest(bytes(32))}, "step chain"),
        ({"kind": int(JobKind.EMBED)}, "counts"),
        ({"kind": int(JobKind.BATCH)}, "counts"),
        ({"kind": 3}, "counts"),
        ({"tier": 2}, "counts"),
        ({"tier": 3}, "counts"),
        ({"is_private": True}, "counts"),
        ({"base_bps": 10_001}, "counts"),
        ({"reservation": OTHER}, "counts"),
        ({"reasoning_tokens": 10}, "work"),
        ({"ste_micro": FINAL.ste_micro - 1}, "work"),
    ],
)
def test_a_lie_that_is_properly_signed_is_still_found(changes: dict[str, Any], check: str) -> None:
    found = failing(resigned(GOOD, -1 % len(GOOD.notches), **changes))
    assert check in found
    assert "receipt signatures" not in found


@pytest.mark.parametrize("cached", [1, 31, 33, 64, 96])
def test_a_hit_that_cannot_be_is_found_even_when_every_receipt_says_it(cached: int) -> None:
    """Of 64 prompt tokens one block can be cached: whole blocks, and the last token is computed."""
    bundle = make_bundle(Recipe(prompt_tokens=64, completion_tokens=3))
    assert "counts" in failing(resigned(bundle, 0, cached_tokens=cached))


@pytest.mark.parametrize("changes", [{"is_kept": True}, {"cached_tokens": 32, "cache_head": OTHER}])
def test_what_names_no_prompt_can_promise_and_hit_nothing(changes: dict[str, Any]) -> None:
    bundle = make_bundle(Recipe(completion_tokens=3, cached_tokens=0, salted=False, kept=False))
    assert "counts" in failing(resigned(bundle, 0, **changes))


@pytest.mark.parametrize("changes", [{"cached_tokens": 0}, {"cache_head": ZERO_DIGEST}])
def test_a_hit_is_counted_and_named_or_neither(changes: dict[str, Any]) -> None:
    bundle = make_bundle(Recipe(completion_tokens=3))
    assert "counts" in failing(resigned(bundle, 0, **changes))


def test_a_mixture_of_experts_states_its_routing() -> None:
    bundle = make_bundle(Recipe(profile=EXPERTS))
    assert failing(resigned(bundle, len(bundle.notches) - 1, routing_root=ZERO_DIGEST)) == ["work"]


def repriced(receipt: WorkReceipt, tariff: Any, **changes: int) -> dict[str, int]:
    """What a provider would state that lies about a count and prices its lie by the tariff."""
    bent = replace(receipt, **changes)
    usage = Usage(bent.prompt_tokens, bent.cached_tokens, bent.completion_tokens, bent.reasoning_tokens)
    timing = Timing(bent.received_at, bent.first_token_at, bent.finished_at, bent.waited_ms)
    cost = cost_up(tariff, usage, basis_of(bent), timing)
    return {**changes, **{name: getattr(cost, name) for name in Cost.__dataclass_fields__}}


@pytest.mark.parametrize("counted", [0, 10, 12, 70])
def test_reasoning_that_the_tokens_do_not_show_is_found(counted: int) -> None:
    """Reasoning costs more than other output here, and the price of the lie recomputes: only the ids tell."""
    changes = repriced(FINAL, GOOD.tariff, reasoning_tokens=counted)
    assert set(failing(resigned(GOOD, len(GOOD.notches) - 1, **changes))) - {"vouchers"} == {"work"}


def test_work_miscounted_by_a_millionth_is_found() -> None:
    assert failing(resigned(GOOD, 0, ste_micro=GOOD.notches[0].receipt.ste_micro + 1)) == ["step chain", "work"]
    usage = Usage(FINAL.prompt_tokens, FINAL.cached_tokens, FINAL.completion_tokens, FINAL.reasoning_tokens)
    assert ste_micro_up(flops(PROFILE, usage)) == FINAL.ste_micro


def test_another_profile_proves_no_work() -> None:
    assert failing(replace(GOOD, profile=EXPERTS)) == ["work"]


@pytest.mark.parametrize(
    "options",
    [
        b"",
        b"\xff",
        encode_options(NO_OPTIONS),
        encode_options(JobOptions(stop_ids=(2,), frequency_milli=501)),
        GOOD.options + b"\0",
    ],
)
def test_options_that_were_not_signed_are_found(options: bytes) -> None:
    found = failing(replace(GOOD, options=options))
    assert "options" in found and "request" not in found


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"prompt_tokens": 56}, "counts"),
        ({"prompt_tokens": 50}, "counts"),  # two texts are no reason to stop
        ({"prompt_tokens": 70}, "counts"),
        ({"cached_tokens": 32, "cache_head": OTHER}, "counts"),
        ({"prompt_head": OTHER}, "counts"),
        ({"prompt_head": OTHER, "is_kept": True}, "counts"),
        ({"completion_tokens": 1}, "counts"),
        ({"finish_reason": int(FinishReason.LENGTH)}, "counts"),
        ({"finish_reason": int(FinishReason.CANCELLED)}, "counts"),  # after the last vector
        ({"kind": int(JobKind.GENERATE)}, "counts"),
        ({"ste_micro": 1}, "work"),
        ({"first_token_at": 0}, "times"),
    ],
)
def test_a_lie_about_an_embedding_job_is_found(changes: dict[str, Any], check: str) -> None:
    bundle = make_bundle(EMBEDDING)
    assert check in failing(resigned(bundle, 0, **changes))


@pytest.mark.parametrize("finish", [FinishReason.STOP, FinishReason.LENGTH])
def test_an_embedding_job_cut_short_did_not_end_by_itself(finish: FinishReason) -> None:
    bundle = make_bundle(replace(EMBEDDING, vectors=1, finish=FinishReason.CANCELLED))
    assert "counts" in failing(resigned(bundle, 0, finish_reason=int(finish)))


def test_an_embedding_job_pays_for_the_texts_delivered() -> None:
    assert EMBEDDING.options.inputs == (20, 30, 7)
    for vectors, read in enumerate((0, 20, 50, 57)):
        finish = FinishReason.STOP if vectors == 3 else FinishReason.CANCELLED
        bundle = make_bundle(replace(EMBEDDING, vectors=vectors, finish=finish))
        (notch,) = bundle.notches
        assert passed(verify(bundle)) and bundle.tariff is not None
        assert notch.receipt.prompt_tokens == read
        refund = notch.receipt.refund
        assert notch.receipt.total == read * bundle.tariff.embedding_price + bundle.tariff.per_request - refund


def test_a_voucher_below_its_receipt_does_not_cover_it() -> None:
    last = GOOD.notches[-1]
    assert last.voucher is not None
    low = replace(last.voucher, cumulative=last.receipt.total - 1)
    notch = replace(last, voucher=low, voucher_signature=SESSION.sign(GOOD.domain, low))
    assert failing(replace(GOOD, notches=(*GOOD.notches[:-1], notch))) == ["vouchers"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps({**TREE, "format": "x"}),
        json.dumps({**TREE, "more": 1}),
        "null",
        "nul",
    ],
)
def test_what_is_no_bundle_is_refused(text: str) -> None:
    with pytest.raises(MalformedBundle) as info:
        decode(text)
    assert "no receipt bundle" in str(info.value)


@given(
    path=st.sampled_from(leaves(TREE)), junk=st.sampled_from([None, -1, 1.5, "", "0X00", "-1", "01", [], {}, 2**300])
)
@settings(max_examples=100, deadline=None)
def test_junk_in_any_place_is_refused_with_its_path(path: tuple[Any, ...], junk: Any) -> None:
    tree = json.loads(json.dumps(TREE))
    at = tree
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = junk
    with pytest.raises(MalformedBundle) as info:
        decode(json.dumps(tree))
    assert str(path[0]) in str(info.value)
