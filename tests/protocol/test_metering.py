"""Usage counts and the STE formula."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import FieldOutOfRange
from protocol.messages import Profile
from protocol.metering import Usage, flops, ste_micro
from protocol.units import ZERO_DIGEST

PROFILE = Profile(
    weights_root=ZERO_DIGEST,
    tokenizer_hash=ZERO_DIGEST,
    chat_template_hash=ZERO_DIGEST,
    special_policy_hash=ZERO_DIGEST,
    dtype_hash=ZERO_DIGEST,
    kv_dtype_hash=ZERO_DIGEST,
    engine_hash=ZERO_DIGEST,
    sampler_hash=ZERO_DIGEST,
    margin_milli=100,
    flag_ppm=1000,
    active_parameters=8_000_000_000,
    total_parameters=8_000_000_000,
    body_parameters=7_000_000_000,
    head_parameters=500_000_000,
    layers=32,
    heads=32,
    head_dim=128,
    window=0,
)
COUNTS = st.integers(0, 300)


@pytest.mark.parametrize(
    "counts", [(1, 2, 0, 0), (1, 0, 1, 2), (-1, 0, 0, 0), (1 << 32, 0, 0, 0), (True, 0, 0, 0), (1.0, 0, 0, 0)]
)
def test_counts_out_of_range(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(FieldOutOfRange):
        Usage(*counts)


def test_ste_of_one_token_through_a_dense_8b_is_about_one() -> None:
    assert ste_micro(dataclasses.replace(PROFILE, body_parameters=8 * 10**9), Usage(1, 0, 0, 0)) == pytest.approx(
        1_000_000, rel=1e-4
    )


@given(COUNTS, COUNTS, COUNTS, st.integers(0, 64))
def test_formula_against_counting_every_query(cached: int, uncached: int, output: int, window: int) -> None:
    profile = dataclasses.replace(PROFILE, window=window)
    prompt = cached + uncached
    keys = sum(min(p + 1, window) if window else p + 1 for p in range(cached, prompt + output))
    expected = 2 * profile.body_parameters * (uncached + output) + 2 * profile.head_parameters * output
    expected += 4 * profile.heads * profile.head_dim * profile.layers * keys
    usage = Usage(prompt, cached, output, 0)
    assert flops(profile, usage) == expected
    assert ste_micro(profile, usage) == math.ceil(Fraction(expected, 16 * 10**9) * 10**6)


@given(COUNTS, COUNTS)
def test_formula_as_published_without_a_window(cached: int, uncached: int) -> None:
    """u*c + u(u+1)/2 + m*n + m(m+1)/2 keys per layer, with n = c + u and m output."""
    m, n, u, c = 17, cached + uncached, uncached, cached
    keys = u * c + u * (u + 1) // 2 + m * n + m * (m + 1) // 2
    only_attention = dataclasses.replace(PROFILE, body_parameters=0, head_parameters=0)
    assert flops(only_attention, Usage(n, c, m, 0)) == 4 * 32 * 128 * 32 * keys


@given(COUNTS, COUNTS, COUNTS)
def test_a_cache_hit_never_raises_the_work(cached: int, uncached: int, output: int) -> None:
    n = cached + uncached
    assert ste_micro(PROFILE, Usage(n, cached, output, 0)) <= ste_micro(PROFILE, Usage(n, 0, output, 0))
    assert ste_micro(PROFILE, Usage(n, cached, output, output)) == ste_micro(PROFILE, Usage(n, cached, output, 0))
