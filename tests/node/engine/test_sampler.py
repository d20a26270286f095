"""Both samplers, torch and compiled, against the pure reference, and the projection matrix against its definition."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from node.engine.compiled import CompiledSampler, make_sampler
from node.engine.kernels import Kernels, build, default_cache
from node.engine.sampler import FINGERPRINT_BYTES, Draw, Sampler
from protocol import sampling, transcript

VOCAB, HIDDEN = 300, 64
CPU = torch.device("cpu")
SAMPLER = Sampler(VOCAB, HIDDEN, CPU)
COMPILED = CompiledSampler(VOCAB, HIDDEN, Kernels(build(default_cache()), torch.float32, 1))
BOTH = pytest.mark.parametrize("sampler", [SAMPLER, COMPILED], ids=["torch", "compiled"])
MICRO = sampling.MICRO
VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "sampling.json").read_text())


def seed(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest()


@pytest.mark.parametrize("case", VECTORS["noise"])
def test_noise_vectors(case: dict[str, dict[str, int]]) -> None:
    keys, token_id = case["post"]["keys"], case["pre"]["token_id"]
    wide = Sampler(token_id + 1, HIDDEN, CPU)
    assert float(wide.noise([tuple(keys)])[0, token_id]) == pytest.approx(case["post"]["noise"], abs=2e-5)  # type: ignore[list-item]


def test_noise_equals_the_reference_over_whole_rows() -> None:
    keys = [sampling.noise_keys(seed(1), position) for position in (0, 1, 77)]
    noise = SAMPLER.noise(keys)
    for row, pair in zip(noise.tolist(), keys, strict=True):
        expected = [sampling.gumbel(sampling.mix(pair, i)) for i in range(VOCAB)]
        assert row == pytest.approx(expected, abs=2e-5)


def test_noise_at_the_ends_of_the_generator() -> None:
    """The mixer is a bijection, so keys exist that give the smallest and the largest word to token 0."""
    x = torch.tensor([0, 1, -1, -(1 << 31)], dtype=torch.int32)
    v = x.float().mul(2.0**-32).add(x < 0).add(2.0**-33).clamp(max=sampling.MAX_UNIFORM)
    got = (-torch.log(-torch.log1p(-v))).tolist()
    assert got == pytest.approx([sampling.gumbel(w) for w in (0, 1, (1 << 32) - 1, 1 << 31)], abs=1e-5)


ROW = st.tuples(
    st.sampled_from([0, 1_000, 300_000, MICRO, 1_700_000]),
    st.sampled_from([1, 50_000, 500_000, 900_000, 999_999, MICRO]),
    st.sampled_from([0, 1, 2, 17, 299, 300, 5_000]),
)


@BOTH
@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6), st.integers(0, 1 << 30), st.sampled_from([0.3, 3.0]))
def test_choices_equal_the_reference(
    sampler: Sampler, rows: list[tuple[int, int, int]], number: int, spread: float
) -> None:
    """Row by row, whatever the company. Logits are eighths, so that equal ones and edges occur."""
    rng = random.Random(number)
    logits = [[round(8 * rng.gauss(0, spread)) / 8 for _ in range(VOCAB)] for _ in rows]
    draws = [Draw.at(seed(number), 5 + i, *row) for i, row in enumerate(rows)]
    got = sampler.choose(torch.tensor(logits), draws).tolist()
    for i, (row, chosen) in enumerate(zip(rows, got, strict=True)):
        expected = sampling.choose(logits[i], seed(number), 5 + i, *row)
        if chosen != expected:  # only where fp32 and fp64 sums fall on two sides of top_p, or scores tie to fp32
            assert sampling.margin(logits[i], chosen, seed(number), 5 + i, *row) < 1e-4


@BOTH
@settings(max_examples=60, deadline=None)
@given(ROW, st.sets(st.integers(0, VOCAB - 1), max_size=VOCAB - 1), st.integers(0, 1 << 30))
def test_a_bias_is_added_before_the_rule(
    sampler: Sampler, row: tuple[int, int, int], banned: set[int], number: int
) -> None:
    """Banned tokens take no part, not even in the nucleus's mass."""
    rng = random.Random(number)
    logits = [[round(8 * rng.gauss(0, 2)) / 8 for _ in range(VOCAB)]]
    bias = [[-float("inf") if i in banned else round(8 * rng.gauss(0, 1)) / 8 for i in range(VOCAB)]]
    chosen = sampler.choose(torch.tensor(logits), [Draw.at(seed(number), 9, *row)], torch.tensor(bias)).item()
    moved = [a + b for a, b in zip(logits[0], bias[0], strict=True)]
    assert chosen not in banned
    if chosen != sampling.choose(moved, seed(number), 9, *row):
        assert sampling.margin(moved, chosen, seed(number), 9, *row) < 1e-4


@BOTH
def test_a_row_without_a_finite_logit_gives_a_token_all_the_same(sampler: Sampler) -> None:
    """A broken model's row must not take the others' tokens with it."""
    logits = torch.full((2, VOCAB), -float("inf"))
    logits[1, 5] = 1.0
    draws = [Draw.at(seed(1), 3, temperature, MICRO, 0) for temperature in (MICRO, 0)]
    assert sampler.choose(logits, draws).tolist() == [0, 5]


def test_compiled_noise_keeps_the_tail() -> None:
    """Equal logits: the chosen token is the one with the largest noise of the reference, whose tail decides."""
    wide = CompiledSampler(5000, HIDDEN, COMPILED._kernels)
    for number in range(20):
        keys = sampling.noise_keys(seed(number), number)
        noise = [sampling.gumbel(sampling.mix(keys, i)) for i in range(5000)]
        chosen = wide.choose(torch.zeros(1, 5000), [Draw.at(seed(number), number, MICRO, MICRO, 0)]).item()
        assert noise[int(chosen)] == pytest.approx(max(noise), abs=1e-5)


def test_the_sampler_goes_with_the_kernels() -> None:
    assert type(make_sampler(VOCAB, HIDDEN, CPU, None)) is Sampler
    assert type(make_sampler(VOCAB, HIDDEN, CPU, COMPILED._kernels)) is CompiledSampler


@BOTH
def test_alternatives_are_the_likeliest_with_their_logprobs(sampler: Sampler) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [7, 3, 250]] = torch.tensor([2.0, 5.0, 5.0])
    rows = sampler.alternatives(logits, 4)
    assert [token for token, _ in rows[0]][:3] == [3, 250, 7]
    assert len(rows[1]) == 4
    for row, found in zip(logits.log_softmax(-1), rows, strict=True):
        assert [transcript.unpack_fp16(raw)[0] for _, raw in found] == pytest.approx(
            [float(row[token]) for token, _ in found], rel=1e-3
        )


def test_projection_is_the_seeds_matrix() -> None:
    expected = torch.tensor(transcript.projection_matrix(seed(3), HIDDEN))
    bits = SAMPLER.projection(seed(3))
    assert torch.equal(2 * (bits >> torch.arange(8, dtype=torch.uint8)[:, None] & 1).int() - 1, expected.int())


@BOTH
@pytest.mark.parametrize("hidden_size", [HIDDEN, 37])
def test_fingerprints_equal_the_reference(sampler: Sampler, hidden_size: int) -> None:
    torch.manual_seed(0)
    if hidden_size != HIDDEN:
        kernels = COMPILED._kernels if sampler is COMPILED else None
        sampler = make_sampler(VOCAB, hidden_size, CPU, kernels)
    logits, hidden = torch.randn(3, VOCAB) * 4, torch.randn(3, hidden_size)
    chosen = torch.tensor([0, 7, 299])
    raw = sampler.fingerprints(logits, hidden, chosen, torch.stack([sampler.projection(seed(i)) for i in range(3)]))
    for i in range(3):
        part = raw[i * FINGERPRINT_BYTES : (i + 1) * FINGERPRINT_BYTES]
        logprob = transcript.unpack_fp16(part[:2])[0]
        assert logprob == pytest.approx(float(logits[i].log_softmax(-1)[chosen[i]]), rel=1e-3)
        reference = transcript.unpack_fp16(transcript.project(seed(i), hidden[i].tolist()))
        assert transcript.unpack_fp16(part[2:]) == pytest.approx(reference, rel=1e-3, abs=1e-4)


@BOTH
def test_fingerprints_hold_what_fp16_cannot(sampler: Sampler) -> None:
    raw = sampler.fingerprints(
        torch.zeros(1, VOCAB),
        torch.full((1, HIDDEN), 1e9),
        torch.tensor([0]),
        torch.full((1, HIDDEN), 255, dtype=torch.uint8),
    )
    assert transcript.unpack_fp16(raw[2:]) == (65504.0,) * 8


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, allow_infinity=False, allow_nan=False))
def test_compiled_halves_are_numpys(value: float) -> None:
    """Through a projection of one number, whose matrix is one sign; a sum knows no negative zero."""
    narrow = CompiledSampler(2, 1, COMPILED._kernels)
    plus = torch.full((1, 1), 255, dtype=torch.uint8)
    raw = narrow.fingerprints(torch.zeros(1, 2), torch.tensor([[value]]), torch.tensor([0]), plus)
    assert raw[2:4] == np.array([value + 0.0]).clip(-65504, 65504).astype(">f2").tobytes()


@pytest.mark.parametrize("temperature", [1_000, 300_000, MICRO, 30 * MICRO])
def test_noise_left_out_never_wins(temperature: int) -> None:
    """The compiled sampler skips tokens that cannot win: flat and peaked logits, against all scores of the other."""
    torch.manual_seed(temperature)
    wide, plain = CompiledSampler(3001, HIDDEN, COMPILED._kernels), Sampler(3001, HIDDEN, CPU)
    for spread in (0.0, 1.0, 8.0):
        logits = spread * torch.randn(40, 3001)
        draws = [Draw.at(seed(i), i, temperature, MICRO, 0) for i in range(40)]
        got, expected = wide.choose(logits, draws), plain.choose(logits, draws)
        noise = plain.noise([draw.keys for draw in draws])
        scores = logits + temperature / MICRO * noise
        lost = scores.gather(1, expected[:, None]) - scores.gather(1, got[:, None])
        assert float(lost.max()) < 1e-4 * max(1.0, temperature / MICRO)
