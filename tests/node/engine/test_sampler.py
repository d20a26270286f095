"""The torch sampler against the pure reference, and the projection matrix against its definition."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from node.engine.sampler import FINGERPRINT_BYTES, Draw, Sampler
from protocol import sampling, transcript

VOCAB, HIDDEN = 300, 64
CPU = torch.device("cpu")
SAMPLER = Sampler(VOCAB, HIDDEN, CPU)
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


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6), st.integers(0, 1 << 30), st.sampled_from([0.3, 3.0]))
def test_choices_equal_the_reference(rows: list[tuple[int, int, int]], number: int, spread: float) -> None:
    """Row by row, whatever the company. Logits are eighths, so that equal ones and edges occur."""
    rng = random.Random(number)
    logits = [[round(8 * rng.gauss(0, spread)) / 8 for _ in range(VOCAB)] for _ in rows]
    draws = [Draw.at(seed(number), 5 + i, *row) for i, row in enumerate(rows)]
    got = SAMPLER.choose(torch.tensor(logits), draws).tolist()
    for i, (row, chosen) in enumerate(zip(rows, got, strict=True)):
        expected = sampling.choose(logits[i], seed(number), 5 + i, *row)
        if chosen != expected:  # only where fp32 and fp64 sums fall on two sides of top_p, or scores tie to fp32
            assert sampling.margin(logits[i], chosen, seed(number), 5 + i, *row) < 1e-4


def test_projection_is_the_seeds_matrix() -> None:
    expected = torch.tensor(transcript.projection_matrix(seed(3), HIDDEN)) / HIDDEN**0.5
    assert torch.allclose(SAMPLER.projection(seed(3)), expected)


def test_fingerprints_equal_the_reference() -> None:
    torch.manual_seed(0)
    logits, hidden = torch.randn(3, VOCAB) * 4, torch.randn(3, HIDDEN)
    chosen = torch.tensor([0, 7, 299])
    raw = SAMPLER.fingerprints(logits, hidden, chosen, torch.stack([SAMPLER.projection(seed(i)) for i in range(3)]))
    for i in range(3):
        part = raw[i * FINGERPRINT_BYTES : (i + 1) * FINGERPRINT_BYTES]
        logprob = transcript.unpack_fp16(part[:2])[0]
        assert logprob == pytest.approx(float(logits[i].log_softmax(-1)[chosen[i]]), rel=1e-3)
        reference = transcript.unpack_fp16(transcript.project(seed(i), hidden[i].tolist()))
        assert transcript.unpack_fp16(part[2:]) == pytest.approx(reference, rel=1e-3, abs=1e-4)


def test_fingerprints_hold_what_fp16_cannot() -> None:
    raw = SAMPLER.fingerprints(
        torch.zeros(1, VOCAB), torch.full((1, HIDDEN), 1e9), torch.tensor([0]), torch.ones(1, 8, HIDDEN)
    )
    assert transcript.unpack_fp16(raw[2:]) == (65504.0,) * 8
