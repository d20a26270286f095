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
from protocol.units import Digest, FinishReason
from tests.node.cli.sticks import NODE, SESSION, Recipe, make_bundle

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
        Recipe(completion_tokens=33, tier=2, private=True, cached_tokens=0),
        Recipe(completion_tokens=10, tier=0, finish=FinishReason.DEADLINE),
        Recipe(prompt_tokens=1001, completion_tokens=96, cached_tokens=1001),
    ],
)
def test_an_honest_job_passes_every_check(recipe: Recipe) -> None:
    checks = verify(make_bundle(recipe))
    assert passed(checks), checks
    skipped = {check.name for check in checks if check.outcome is Outcome.SKIP}
    assert skipped == ({"token ids"} if recipe.completion_tokens == 0 else set())


def test_json_gives_the_same_bundle_back() -> None:
    assert decode(encode(GOOD)) == GOOD
    bare = replace(GOOD, tariff=None, tariff_signature=b"", notches=())
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
    outcome = {check.name: check.outcome for check in verify(replace(GOOD, notches=halves, tariff=None))}
    for name in ("receipt signatures", "vouchers", "acknowledgement", "tariff", "cost"):
        assert outcome[name] is Outcome.SKIP
    assert outcome["step chain"] is Outcome.OK


def resigned(bundle: Bundle, index: int, **changes: Any) -> Bundle:
    """With a receipt that a dishonest provider changed and signed again, the later ones left as they are."""
    from protocol.eip712 import digest

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


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"total": GOOD.notches[-1].receipt.total + 1}, "cost"),
        ({"completion_tokens": 71}, "cost"),
        ({"refund": 1}, "cost"),
        ({"finish_reason": int(FinishReason.LENGTH)}, "counts"),
        ({"finish_reason": 99}, "step chain"),
        ({"is_final": False}, "step chain"),
        ({"cached_tokens": 18}, "counts"),
        ({"first_token_at": 1}, "times"),
        ({"leaves_root": GOOD.notches[-2].receipt.leaves_root}, "counts"),
        ({"step": 4}, "step chain"),
        ({"previous": Digest(bytes(32))}, "step chain"),
    ],
)
def test_a_lie_that_is_properly_signed_is_still_found(changes: dict[str, Any], check: str) -> None:
    found = failing(resigned(GOOD, -1 % len(GOOD.notches), **changes))
    assert check in found
    assert "receipt signatures" not in found


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
