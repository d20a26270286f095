"""Calibration: bounds that are exact, thresholds that honest work stays under and an int8 copy does not."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from devnet.model import moe
from incentives.evidence import MAX_FLAG_PPM
from node.engine.calibration import (
    CEILING,
    FLOORS,
    VARIANTS,
    Numbers,
    calibrate,
    fitted,
    rate_bound,
    with_entry,
    write,
)
from node.engine.engine import TorchEngine
from node.engine.profile import profile_of
from node.engine.replay import TorchReplayer
from node.engine.spec import ModelError
from node.engine.thresholds import CALIBRATION_FILE, UNCALIBRATED, Thresholds
from node.ports import Replay, ReplayRequest, Sampling
from protocol.eip712 import hash_struct
from protocol.messages import Profile
from protocol.transcript import Row
from tests.node.engine.lab import ask
from tests.node.engine.models import SHIPPED

MOE = SHIPPED.parent / moe.NAME


def limits_of(profile: Profile) -> Thresholds:
    return Thresholds(*(getattr(profile, name) for name in Thresholds.__slots__))


# -------------------------------------------------------------------------------------------------------------- numbers


@given(tokens=st.integers(1, 40_000), flags=st.integers(0, 30), confidence=st.sampled_from([0.9, 0.999]))
def test_the_bound_is_the_rate_at_which_so_few_flags_are_just_that_unlikely(
    tokens: int, flags: int, confidence: float
) -> None:
    bound = rate_bound(flags, tokens, confidence)
    if flags >= tokens:
        assert bound == 1.0
        return
    assert flags / tokens < bound < 1
    seen = math.fsum(math.comb(tokens, k) * bound**k * (1 - bound) ** (tokens - k) for k in range(flags + 1))
    assert seen == pytest.approx(1 - confidence, rel=1e-6)


def test_the_bound_without_a_flag_in_closed_form() -> None:
    assert rate_bound(0, 25_000) == pytest.approx(1 - 0.001 ** (1 / 25_000))


HONEST = st.lists(st.floats(0, 0.02), min_size=1, max_size=40)


@given(numbers=HONEST, infinite=st.booleans())
def test_fp32_thresholds_hold_all_they_were_made_from(numbers: list[float], infinite: bool) -> None:
    values = np.array(numbers)
    margins = np.array([*numbers[1:], math.inf if infinite else 0.0])
    honest = Numbers(margins, values, values, np.zeros(len(values)))
    limits = fitted(honest, "fp32")
    assert honest.flagged(limits).tolist() == [False] * (len(values) - 1) + [infinite]
    for name in ("margin_milli", "logprob_micro", "projection_micro"):
        assert getattr(FLOORS["fp32"], name) <= getattr(limits, name) <= getattr(CEILING, name)
    assert not honest.louder(0.5).flagged(limits)[:-1].any()


def test_each_number_flags_by_itself() -> None:
    limits = Thresholds(100, 1_000, 2_000, 500)
    margins, logprobs = np.array([0.1, 0.11, 0, 0, 0]), np.array([0.001, 0, 0.0011, 0, 0])
    at = Numbers(margins, logprobs, np.array([0.002, 0, 0, 0.0021, 0]), np.array([0, 0, 0, 0, 1.0]))
    assert at.flagged(limits).tolist() == [False, True, True, True, True]


# ------------------------------------------------------------------------------------------------------ the whole of it

SOME = tuple(
    v for v in VARIANTS if (v.name, v.compiled) in {("alone", "on"), ("prefix cache", "on"), ("displaced", "off")}
)
"""Each kind of kernels, a cache, a displacement; all variants together take minutes on a busy machine."""


@pytest.fixture(scope="module")
def calibrated(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[[str], Path]
) -> tuple[Path, dict[str, Any]]:
    """A small mixture of experts, calibrated in fp32."""
    directory = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(model_dir("mixtral"), directory)
    entry = asyncio.run(calibrate(directory, tokens=400, variants=SOME))
    write(directory, with_entry(None, directory, "fp32", entry))
    return directory, entry


def test_honest_work_in_every_variant_is_never_flagged(calibrated: tuple[Path, dict[str, Any]]) -> None:
    _, entry = calibrated
    assert [(row["name"], row["kernels"]) for row in entry["variants"]] == [(v.name, v.compiled) for v in SOME]
    assert all(row["tokens"] for row in entry["variants"])
    assert entry["held"]["flags"] == entry["held"]["voids"] == 0
    assert entry["thresholds"]["flag_ppm"] == entry["held"]["rate_bound_ppm"] <= MAX_FLAG_PPM
    assert sum(row["tokens"] for row in entry["variants"]) == sum(entry["tokens"].values())
    assert entry["other_dtype"]["flags"] > 0  # bf16 work is not fp32 work
    json.dumps(entry, allow_nan=False)


def test_the_profile_takes_what_was_measured(calibrated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    directory, entry = calibrated
    copied = Path(shutil.copytree(directory, tmp_path / "copy"))
    assert limits_of(profile_of(copied)) == Thresholds(**entry["thresholds"])
    assert limits_of(profile_of(copied, "bf16")) == UNCALIBRATED["bf16"]
    before = hash_struct(profile_of(copied))
    (copied / CALIBRATION_FILE).unlink()
    assert limits_of(profile_of(copied)) == UNCALIBRATED["fp32"]
    assert hash_struct(profile_of(copied)) != before


def test_a_calibration_that_does_not_fit_is_refused(calibrated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(calibrated[0], tmp_path / "copy"))
    file = copied / CALIBRATION_FILE
    good = json.loads(file.read_text())

    def entry(**changes: Any) -> dict[str, Any]:
        return {**good, "dtypes": {"fp32": {**good["dtypes"]["fp32"], **changes}}}

    limits = good["dtypes"]["fp32"]["thresholds"]
    for bad, said in (
        ({**good, "weights_root": "0x00"}, "other weights"),
        ({**good, "format": "2"}, "no calibration"),
        (entry(versions={"engine": "another", "sampler": "x"}), "is of another"),
        (entry(thresholds={**limits, "flag_ppm": MAX_FLAG_PPM + 1}), "damaged"),
        (entry(thresholds={**limits, "margin_milli": 0}), "damaged"),
        (entry(thresholds={}), "damaged"),
        (entry(thresholds=None), "damaged"),
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises(ModelError, match=said):
            profile_of(copied)
    file.write_text("[")
    with pytest.raises(ModelError, match=CALIBRATION_FILE):
        profile_of(copied)


def test_entries_of_other_weights_are_not_kept(calibrated: tuple[Path, dict[str, Any]]) -> None:
    directory, entry = calibrated
    before = with_entry(None, directory, "fp32", entry)
    both = with_entry(before, directory, "bf16", entry)
    assert set(both["dtypes"]) == {"fp32", "bf16"}
    assert set(with_entry({**before, "weights_root": "0x00"}, directory, "bf16", entry)["dtypes"]) == {"bf16"}


# ------------------------------------------------------------------------------------------------- the shipped models


def test_the_shipped_mixture_is_what_its_script_writes(tmp_path: Path) -> None:
    made = moe.build(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (made / name).read_bytes() == (MOE / name).read_bytes(), name


@pytest.mark.parametrize(("directory", "dtype"), [(SHIPPED, "fp32"), (SHIPPED, "bf16"), (MOE, "fp32")])
def test_the_shipped_models_are_calibrated(directory: Path, dtype: str) -> None:
    profile = profile_of(directory, dtype)
    assert limits_of(profile) != UNCALIBRATED
    assert 0 < profile.flag_ppm <= (MAX_FLAG_PPM if dtype == "bf16" else 500)


def int8_copy(directory: Path, target: Path) -> Path:
    """The weights of all linear maps rounded to 8 bits a number, one scale a row: the usual weight-only format."""
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns(CALIBRATION_FILE))
    tensors = load_file(target / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name:
            scale = tensor.float().abs().amax(-1, keepdim=True) / 127
            tensors[name] = ((tensor.float() / scale).round() * scale).to(torch.bfloat16)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("directory", [SHIPPED, MOE], ids=["dense", "experts"])
async def test_int8_weights_are_told_from_the_true_ones(directory: Path, tmp_path: Path) -> None:
    """In fp32 the fingerprint flags nearly every token of the copy, and none of the original."""
    rates = []
    replayer = TorchReplayer(directory, "fp32")
    await replayer.start()
    limits = limits_of(replayer.profile)
    for served in (directory, int8_copy(directory, tmp_path / "int8")):
        engine = TorchEngine(served, "fp32", slots=4)
        await engine.start()

        async def looked(number: int, engine: TorchEngine = engine) -> Replay:
            request = ask(number, 40, 40, how=Sampling(900_000, 950_000))
            request = replace(request, prompt=tuple(4 + token for token in request.prompt))
            async with aclosing(await engine.submit(request)) as stream:
                rows = tuple([Row(t.token_id, t.logprob, t.projection, t.routing) async for t in stream])
            asked = ReplayRequest(request.prompt, rows, request.seed, request.sampling, request.options)
            return await replayer.replay(asked)

        found = Numbers.of(await asyncio.gather(*map(looked, range(4))))
        rates.append(float(found.flagged(limits).mean()))
        await engine.stop()
    await replayer.stop()
    assert rates[0] == 0
    assert rates[1] > 0.9
