"""The seed-locked sampler: vectors, statistics of the noise, the cut rules and the tolerant margin."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import sampling
from protocol.errors import FieldOutOfRange

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "sampling.json").read_text())
SEED = bytes(range(32))
MICRO = sampling.MICRO


@pytest.mark.parametrize("case", VECTORS["noise"])
def test_noise_vectors(case: dict[str, Any]) -> None:
    pre, post = case["pre"], case["post"]
    seed = bytes.fromhex(pre["seed"])
    keys = sampling.noise_keys(seed, pre["position"])
    assert list(keys) == post["keys"]
    assert sampling.mix(keys, pre["token_id"]) == post["word"]
    assert sampling.noise(seed, pre["position"], pre["token_id"]) == pytest.approx(post["noise"], rel=1e-12)


@pytest.mark.parametrize("case", VECTORS["seed"])
def test_seed_vectors(case: dict[str, Any]) -> None:
    pre = [bytes.fromhex(case["pre"][name]) for name in ("job_id", "client_nonce", "provider_nonce")]
    assert sampling.derive_seed(*pre).hex() == case["post"]


@pytest.mark.parametrize("case", VECTORS["choose"])
def test_choice_vectors(case: dict[str, Any]) -> None:
    pre = dict(case["pre"])
    seed = bytes.fromhex(pre.pop("seed"))
    assert sampling.choose(seed=seed, **pre) == case["post"]
    assert sampling.margin(seed=seed, chosen=case["post"], **pre) == 0


def test_seed_refuses_short_parts() -> None:
    with pytest.raises(FieldOutOfRange):
        sampling.derive_seed(b"\0" * 32, b"\0" * 31, b"\0" * 33)
    with pytest.raises(FieldOutOfRange):
        sampling.noise_keys(b"short", 0)


def test_noise_is_finite_at_both_ends() -> None:
    assert sampling.gumbel(0) == pytest.approx(33 * math.log(2), abs=1e-6)
    assert sampling.gumbel((1 << 32) - 1) == pytest.approx(-math.log(24 * math.log(2)), abs=1e-6)


def test_noise_has_gumbel_moments_and_no_visible_structure() -> None:
    """Mean 0.5772, variance pi^2/6; neighbours in position and in token id are uncorrelated."""
    rows, columns = 300, 100
    table = [
        [sampling.gumbel(sampling.mix(sampling.noise_keys(SEED, p), i)) for i in range(columns)] for p in range(rows)
    ]
    flat = [value for row in table for value in row]
    mean = math.fsum(flat) / len(flat)
    variance = math.fsum((value - mean) ** 2 for value in flat) / len(flat)
    assert mean == pytest.approx(0.5772, abs=0.03)
    assert variance == pytest.approx(math.pi**2 / 6, abs=0.08)
    across = math.fsum((row[i] - mean) * (row[i + 1] - mean) for row in table for i in range(columns - 1))
    down = math.fsum((a - mean) * (b - mean) for r, s in itertools.pairwise(table) for a, b in zip(r, s, strict=True))
    for total, count in ((across, rows * (columns - 1)), (down, (rows - 1) * columns)):
        assert abs(total / count / variance) < 4 / math.sqrt(count)


def test_choices_follow_the_softmax() -> None:
    """Chi-square of 6,000 positions against softmax(logits / T): 5 degrees of freedom, p > 1e-4 below 25.7."""
    logits = [0.0, 1.0, 2.0, -1.0, 0.5, 1.5]
    temperature = 700_000
    weights = [math.exp(x * MICRO / temperature) for x in logits]
    draws = 6000
    seen = Counter(sampling.choose(logits, SEED, p, temperature, MICRO, 0) for p in range(draws))
    expected = [draws * w / sum(weights) for w in weights]
    assert sum((seen[i] - e) ** 2 / e for i, e in enumerate(expected)) < 25.7


def test_temperature_zero_is_argmax_with_the_lowest_id() -> None:
    assert sampling.choose([1.0, 3.0, 3.0, 2.0], SEED, 0, 0, 1, 1) == 1


def test_equal_logits_at_the_edge_are_all_in() -> None:
    logits = [1.0, 1.0, 0.0]
    assert {sampling.choose(logits, SEED, p, MICRO, MICRO, 1) for p in range(60)} == {0, 1}


@pytest.mark.parametrize(("top_p", "allowed"), [(499_000, {0}), (510_000, {0, 1}), (760_000, {0, 1, 2})])
def test_top_p_keeps_what_less_likely_mass_precedes(top_p: int, allowed: set[int]) -> None:
    logits = [math.log(x) for x in (0.5, 0.25, 0.15, 0.1)]
    assert {sampling.choose(logits, SEED, p, MICRO, top_p, 0) for p in range(120)} == allowed


LOGITS = st.lists(st.floats(-12, 12, allow_nan=False, width=32), min_size=2, max_size=24)


@settings(max_examples=150, deadline=None)
@given(
    LOGITS,
    st.binary(min_size=32, max_size=32),
    st.integers(0, 1 << 20),
    st.sampled_from([0, 1, 300_000, MICRO, 1_700_000]),
    st.sampled_from([1, 10_000, 500_000, 900_000, MICRO]),
    st.sampled_from([0, 1, 2, 5, 40]),
)
def test_the_chosen_token_has_no_margin_even_under_noise(
    logits: list[float], seed: bytes, position: int, temperature: int, top_p: int, top_k: int
) -> None:
    """Exactly computed: 0. Computed from logits off by up to 0.02: at most twice that."""
    chosen = sampling.choose(logits, seed, position, temperature, top_p, top_k)
    assert sampling.margin(logits, chosen, seed, position, temperature, top_p, top_k) == 0
    noisy = [x + 0.02 * math.sin(1000 * i + 1) for i, x in enumerate(logits)]
    if temperature == 0 or temperature >= 300_000:  # below, 0.02 logits move more than 0.01 of mass
        swings = top_p < MICRO and temperature > 0 and _mass_moved(logits, noisy, temperature) > sampling.EDGE_MASS
        if not swings:
            assert sampling.margin(noisy, chosen, seed, position, temperature, top_p, top_k) <= 0.0401


def _mass_moved(a: list[float], b: list[float], temperature: int) -> float:
    p, q = (sampling._softmax(x, temperature) for x in (a, b))
    return sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2


def test_a_token_outside_the_nucleus_has_infinite_margin() -> None:
    logits = [5.0, 4.9, 0.0, 0.0]
    outside = {p: sampling.margin(logits, 2, SEED, p, MICRO, MICRO, 1) for p in range(3)}
    assert set(outside.values()) == {math.inf}
    assert sampling.margin(logits, 1, SEED, 0, MICRO, MICRO, 1) == 0.0  # 0.1 below the edge: admitted, no firm rival


@pytest.mark.parametrize("values", [(-1, 1, 0), (101 * MICRO, 1, 0), (0, 0, 0), (0, MICRO + 1, 0), (0, 1, -1)])
def test_parameters_out_of_range(values: tuple[int, int, int]) -> None:
    with pytest.raises(FieldOutOfRange):
        sampling.check_sampling(*values)
