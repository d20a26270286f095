"""The compiled kernels: built once, refused safely, the numbers of plain torch, and bits that no company changes."""

from __future__ import annotations

import logging
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from node.engine import kernels
from node.engine.compiled import CompiledDecoder, kernels_for, make_decoder
from node.engine.decoder import Batch, Decoder, Segment
from node.engine.kernels import Kernels, KernelsUnavailable, build, default_cache
from node.engine.spec import ModelError, load_spec
from node.engine.weights import TORCH_DTYPES, Linear, load_weights
from tests.node.engine import models

CPU = torch.device("cpu")
CONTEXT, SLOTS = 128, 4


def decoder(directory: Path, dtype: str = "fp32", compiled: bool = True, threads: int = 1) -> Decoder:
    spec = load_spec(directory)
    with torch.inference_mode():
        found = Kernels(build(default_cache()), TORCH_DTYPES[dtype], threads) if compiled else None
        return make_decoder(spec, load_weights(directory, spec, dtype, CPU, found), SLOTS, CONTEXT, 0, found)


def prefill(run: Decoder, ids: tuple[int, ...], slot: int = 0) -> torch.Tensor:
    """[tokens, hidden]: the whole text in one forward."""
    with torch.inference_mode():
        return run.forward(Batch([], [], [], [Segment(slot, 0, ids)])).hidden.clone()


def text(number: int, length: int, vocab: int = 100) -> tuple[int, ...]:
    rng = random.Random(number)
    return tuple(rng.randrange(1, vocab) for _ in range(length))


@pytest.mark.parametrize("name", models.NAMES)
def test_kernels_compute_what_torch_computes(name: str, model_dir: Callable[[str], Path]) -> None:
    """Prompts together, then a token each, in every architecture: norms, positions, windows, biases, experts."""
    plain, compiled = decoder(model_dir(name), compiled=False), decoder(model_dir(name))
    batches = [
        Batch([], [], [], [Segment(0, 0, text(1, 50)), Segment(1, 0, text(2, 7))]),
        Batch([0, 1], [5, 6], [50, 7], [Segment(2, 0, text(3, 20))]),
        Batch([2, 0], [9, 9], [20, 51], []),
    ]
    with torch.inference_mode():
        for batch in batches:
            expected, got = plain.forward(batch), compiled.forward(batch)
            assert torch.allclose(got.hidden, expected.hidden, rtol=1e-4, atol=1e-4)
            assert (got.routing is None) == (expected.routing is None)
            if got.routing is not None and expected.routing is not None:
                assert torch.equal(got.routing, expected.routing)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["shipped", "qwen3", "mistral-window", "mixtral"])
@settings(max_examples=12, deadline=None)
@given(number=st.integers(0, 1 << 20))
def test_no_company_and_no_cut_changes_a_bit(
    name: str, dtype: str, number: int, model_dir: Callable[[str], Path]
) -> None:
    """Streams cut into chunks and single tokens at random, mixed at random: every hidden state, bit for bit, is the one
    of a forward over the whole text alone."""
    run = decoder_of(name, dtype, model_dir)
    rng = random.Random(number)
    texts = [text(number + i, rng.randrange(2, 90)) for i in range(SLOTS)]
    whole = [prefill(run, ids) for ids in texts]
    fed = [0] * SLOTS
    while any(fed[i] < len(texts[i]) for i in range(SLOTS)):
        decode, segments, rows = [], [], []
        for slot in rng.sample(range(SLOTS), rng.randrange(1, SLOTS + 1)):
            left = len(texts[slot]) - fed[slot]
            if left and rng.random() < 0.5:
                decode.append(slot)
            elif left:
                segments.append((slot, rng.randrange(1, left + 1)))
        rows = [(slot, 1) for slot in decode] + segments
        if not rows:
            continue
        batch = Batch(
            decode,
            [texts[slot][fed[slot]] for slot in decode],
            [fed[slot] for slot in decode],
            [Segment(slot, fed[slot], texts[slot][fed[slot] : fed[slot] + n]) for slot, n in segments],
        )
        with torch.inference_mode():
            hidden, at = run.forward(batch).hidden, 0
        for slot, n in rows:
            assert torch.equal(hidden[at : at + n], whole[slot][fed[slot] : fed[slot] + n])
            fed[slot] += n
            at += n


_DECODERS: dict[tuple[str, str], Decoder] = {}


def decoder_of(name: str, dtype: str, model_dir: Callable[[str], Path]) -> Decoder:
    """Kept over Hypothesis' examples."""
    if (name, dtype) not in _DECODERS:
        _DECODERS[name, dtype] = decoder(model_dir(name), dtype)
    return _DECODERS[name, dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_threads_compute_the_same_bits(dtype: str, model_dir: Callable[[str], Path]) -> None:
    """Of the kernels; oneDNN is kept to one thread, as all tests here are."""
    one, two = (decoder(model_dir("shipped"), dtype, threads=n) for n in (1, 2))
    assert torch.equal(prefill(one, text(4, 100)), prefill(two, text(4, 100)))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 2, 1), (5, 34, 31), (12, 64, 32), (40, 96, 100)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_torch(rows: int, inputs: int, outputs: int, biased: bool) -> None:
    """Sums in fp32, rounded to bf16 once; and each row as if it were alone."""
    found = Kernels(build(default_cache()), torch.bfloat16, 1)
    if not found.multiplies:
        pytest.skip("this processor has no bf16 products")
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    bias = torch.randn(outputs, generator=generator).bfloat16() if biased else None
    linear = Linear(weight, bias, found)
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert torch.allclose(linear(x).float(), expected, rtol=2**-8, atol=1e-4)
    assert torch.equal(linear.wide(x), linear(x).float())
    assert all(torch.equal(linear(x[i : i + 1])[0], linear(x)[i]) for i in range(rows))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["shipped", "qwen2", "qwen3", "mistral-window", "llama-bias"])
def test_compiled_bf16_is_as_near_to_fp32_as_torch_is(name: str, dtype: str, model_dir: Callable[[str], Path]) -> None:
    """Both round; neither may be the worse by more than chance."""
    ids = text(8, 100)
    exact = prefill(decoder(model_dir(name), "fp32", compiled=False), ids)
    errors = [
        float((prefill(decoder(model_dir(name), dtype, compiled=flag), ids).float() - exact).pow(2).mean().sqrt())
        for flag in (True, False)
    ]
    assert errors[0] <= 1.2 * errors[1] + 1e-5


@pytest.mark.parametrize("sizes", [{"head_dim": 20}, {"head_dim": 72}, {"hidden_size": 54, "intermediate_size": 37}])
@pytest.mark.parametrize(("dtype", "near"), [("fp32", 1e-4), ("bf16", 0.2)])
def test_sizes_that_fill_no_vector(sizes: dict[str, int], dtype: str, near: float, tmp_path: Path) -> None:
    directory = models.save("llama", tmp_path / "odd", **sizes)
    got, expected = (prefill(decoder(directory, dtype, compiled=flag), text(1, 60)) for flag in (True, False))
    assert torch.allclose(got, expected, rtol=near, atol=near)


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(tmp_path)
    run = subprocess.run

    def only_version(command: list[str], **options: object) -> object:
        assert "-shared" not in command, "compiled again"
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", only_version)
    assert build(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


@pytest.mark.slow
def test_other_flags_are_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(tmp_path)
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-g0"))
    assert build(tmp_path) != first


def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    """What lies there is loaded and run."""
    tmp_path.chmod(0o777)
    with pytest.raises(KernelsUnavailable, match="chmod 700"):
        build(tmp_path)


def options(name: str, tmp_path: Path, device: str = "cpu") -> Kernels | None:
    spec = load_spec(models.SHIPPED)
    return kernels_for(name, spec, torch.float32, torch.device(device), 1, tmp_path / "cache")


def test_without_a_compiler_auto_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert options("auto", tmp_path) is None
    assert "no C compiler found" in caplog.text
    with pytest.raises(ModelError, match="no C compiler found"):
        options("on", tmp_path)


def test_source_that_does_not_compile_is_said_with_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.c"
    broken.write_text("int f( {")
    monkeypatch.setattr(kernels, "SOURCES", (broken,))
    with pytest.raises(KernelsUnavailable, match="error"):
        build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_options(tmp_path: Path) -> None:
    assert options("off", tmp_path) is None
    assert isinstance(options("on", tmp_path), Kernels)
    assert options("auto", tmp_path, "meta") is None
    with pytest.raises(ModelError, match="there are none for meta"):
        options("on", tmp_path, "meta")
    with pytest.raises(ModelError, match="not one of off, auto, on"):
        options("perhaps", tmp_path)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_the_decoder_goes_with_the_kernels(model_dir: Callable[[str], Path]) -> None:
    assert type(decoder(model_dir("llama"), compiled=False)) is Decoder
    assert type(decoder(model_dir("llama"))) is CompiledDecoder
