"""Usage counts and the STE formula."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import FieldOutOfRange
from protocol.messages import Profile
from protocol.metering import Reasoning, Usage, embedding_flops, flops, opens_reasoning, ste_micro_up
from tests.protocol.sheets import PROFILE

COUNTS = st.integers(0, 300)


def ste_micro(profile: Profile, usage: Usage) -> int:
    """What a receipt states for a job that generates."""
    return ste_micro_up(flops(profile, usage))


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


@given(st.integers(0, 2**80))
def test_ste_is_rounded_up_once(operations: int) -> None:
    assert ste_micro_up(operations) == math.ceil(Fraction(operations, 16 * 10**9) * 10**6)


@given(st.lists(COUNTS, max_size=32), st.integers(0, 64))
def test_texts_of_an_embedding_job_do_not_see_one_another(lengths: list[int], window: int) -> None:
    """Each text by itself: no head, and no key of another text."""
    profile = dataclasses.replace(PROFILE, window=window)
    keys = sum(min(p + 1, window) if window else p + 1 for length in lengths for p in range(length))
    expected = 2 * profile.body_parameters * sum(lengths) + 4 * profile.heads * profile.head_dim * profile.layers * keys
    assert embedding_flops(profile, lengths) == expected
    assert embedding_flops(profile, lengths) <= flops(profile, Usage(sum(lengths), 0, 0, 0))


# ------------------------------------------------------------------------------------------------------------ reasoning

START, END = 7, 8
TEXTS = st.lists(st.sampled_from([START, END, 1, 2]), max_size=80)


def marked(tokens: list[int], *, opened: bool) -> list[bool]:
    """Which tokens lie in a block, read off the text: from a start, or the beginning, up to the next end."""
    out = []
    inside = opened
    for token in tokens:
        if token == START:
            inside = True
        out.append(inside)
        if token == END:
            inside = False
    return out


@given(TEXTS, st.booleans())
def test_a_block_counts_with_its_markers(tokens: list[int], opened: bool) -> None:
    after = Reasoning(START, END, opened).take(tokens)
    assert after.tokens == sum(marked(tokens, opened=opened))


@given(TEXTS, st.booleans(), st.lists(st.integers(0, 80), max_size=8))
def test_any_split_of_the_tokens_counts_the_same(tokens: list[int], opened: bool, cuts: list[int]) -> None:
    """Frames cut a stream anywhere; a receipt after each counts what one over all would."""
    whole = Reasoning(START, END, opened).take(tokens)
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    parts = Reasoning(START, END, opened)
    for first, last in itertools.pairwise(bounds):
        parts = parts.take(tokens[first:last])
        assert parts.tokens == sum(marked(tokens[:last], opened=opened))
    assert parts == whole


@pytest.mark.parametrize(
    ("tokens", "opened", "count"),
    [
        ([1, START, 1, 1, END, 1], False, 4),
        ([1, 1, END, 1], True, 3),  # the template opened the block
        ([1, 1, END, 1], False, 0),  # an end that nothing opened
        ([START, 1, 1], False, 3),  # cut off inside
        ([START, 1, START, END, 1], False, 4),  # a start within a block opens nothing new
        ([END, START, END], True, 3),
        ([], True, 0),
    ],
)
def test_what_counts_as_reasoning(tokens: list[int], opened: bool, count: int) -> None:
    assert Reasoning(START, END, opened).take(tokens).tokens == count


@given(st.lists(st.integers(0, 3)), st.booleans())
def test_a_template_without_markers_has_no_reasoning(tokens: list[int], opened: bool) -> None:
    """Token 0 is a token like any other there."""
    assert Reasoning(0, 0, opened).take(tokens).tokens == 0
    assert not opens_reasoning(PROFILE, tokens)


@given(TEXTS)
def test_a_prompt_opens_a_block_that_it_does_not_close(prompt: list[int]) -> None:
    profile = dataclasses.replace(PROFILE, reasoning_start=START, reasoning_end=END)
    last = max((at for at, token in enumerate(prompt) if token in (START, END)), default=None)
    assert opens_reasoning(profile, prompt) == (last is not None and prompt[last] == START)
    assert opens_reasoning(profile, prompt) == Reasoning(START, END).take(prompt).open
