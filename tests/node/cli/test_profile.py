"""`tally profile`: calibrated once, shown, put on the Court's list once; a stand-in measures in place of the engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from node.config import NodeConfig
from node.engine import calibration
from node.engine.profile import profile_of, versions
from node.engine.thresholds import CALIBRATION_FILE
from protocol.eip712 import hash_struct
from protocol.units import WEI_PER_TALLY, Digest
from tests.node.cli.conftest import Tally
from tests.node.cli.sticks import WALLET
from tests.node.engine.models import SHIPPED
from tests.twins.chain_lab import MemoryLab
from tests.twins.memory_court import CourtWorld, MemoryCourt

LIMITS = {"margin_milli": 40, "logprob_micro": 3_000, "projection_micro": 2_000, "flag_ppm": 290}
ENTRY: dict[str, Any] = {
    "versions": versions(),
    "thresholds": LIMITS,
    "tokens": {"fit": 8_000, "held": 24_000},
    "held": {"flags": 0, "flags_with_room": 2, "rate_bound_ppm": 290, "confidence": 0.999, "voids": 0},
    "variants": [
        {"name": "alone", "kernels": "on", "tokens": 32_000, "margins": 0.0, "logprobs": 1e-6, "projections": 2e-6}
    ],
    "other_dtype": {"dtype": "bf16", "tokens": 100, "flags": 99},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "model", ignore=shutil.ignore_patterns(CALIBRATION_FILE)))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What was asked of the calibration: dtype, tokens, seed."""
    asked: list[tuple[str, int, int]] = []

    async def calibrate(directory: Path, dtype: str, tokens: int, seed: int, say: Any, *_: Any) -> dict[str, Any]:
        say("generating", 1, 2)
        asked.append((dtype, tokens, seed))
        return ENTRY

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    return asked


def test_calibrated_once_and_then_only_by_force(
    tally: Tally, model: Path, measured: list[tuple[str, int, int]]
) -> None:
    before = hash_struct(profile_of(model)).hex()
    result = tally("profile", "calibrate", "--model", str(model), "--quick")
    assert result.exit_code == 0, result.output
    found = profile_of(model)
    assert {name: getattr(found, name) for name in LIMITS} == LIMITS
    after = hash_struct(found).hex()
    assert f"no longer 0x{before}" in result.stderr and after in result.stderr and "tariff" in result.stderr
    assert "290 flags per million" in result.stdout
    again = tally("profile", "calibrate", "--model", str(model))
    assert again.exit_code == 1 and "--force" in again.stderr
    other = tally("profile", "calibrate", "--model", str(model), "--dtype", "bf16", "--tokens", "700", "--json")
    assert json.loads(other.stdout)["dtype"] == "bf16"
    forced = tally("profile", "calibrate", "--model", str(model), "--force", "--seed", "5")
    assert forced.exit_code == 0, forced.output
    assert measured == [("auto", calibration.QUICK_TOKENS, 1), ("bf16", 700, 1), ("auto", calibration.TOKENS, 5)]
    assert set(json.loads((model / CALIBRATION_FILE).read_text())["dtypes"]) == {"fp32", "bf16"}


def test_a_calibration_of_other_weights_is_replaced_by_force(
    tally: Tally, model: Path, measured: list[tuple[str, int, int]]
) -> None:
    tally("profile", "calibrate", "--model", str(model))
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-4}))
    refused = tally("profile", "show", "--model", str(model))
    assert refused.exit_code == 1 and "other weights" in refused.stderr and "--force" in refused.stderr
    assert tally("profile", "calibrate", "--model", str(model), "--force").exit_code == 0
    assert tally("profile", "show", "--model", str(model)).exit_code == 0


def test_shown_with_and_without_a_calibration(tally: Tally, model: Path, measured: list[tuple[str, int, int]]) -> None:
    plain = tally("profile", "show", "--model", str(model))
    assert plain.exit_code == 0 and "not calibrated" in plain.stdout
    assert hash_struct(profile_of(model)).hex() in plain.stdout
    tally("profile", "calibrate", "--model", str(model))
    shown = json.loads(tally("profile", "show", "--model", str(model), "--json").stdout)
    assert shown["profile_id"] == "0x" + hash_struct(profile_of(model)).hex()
    assert shown["calibration"] == ENTRY and shown["profile"]["flag_ppm"] == 290
    assert "24,000" in tally("profile", "show", "--model", str(model)).stdout


def test_a_model_must_be_named(tally: Tally, home: Path) -> None:
    result = tally("profile", "show")
    assert result.exit_code == 1 and "--model" in result.stderr


def test_registered_once(tally: Tally, furnished: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = MemoryLab()
    lab.world.fund(WALLET.address, 1000 * WEI_PER_TALLY, 10**18)
    court = CourtWorld(lab.world)

    @asynccontextmanager
    async def wallet_chain(config: NodeConfig) -> AsyncIterator[Any]:
        node = await lab.node(WALLET)
        yield node, WALLET
        await node.stop()

    monkeypatch.setattr("node.app.wallet_chain", wallet_chain)
    monkeypatch.setattr("node.app.court_of", lambda chain: MemoryCourt(court, chain))
    args = ("profile", "register", "--model", str(model))
    declined = tally(*args, stdin="n\n")
    assert declined.exit_code == 130 and "1000 flags per million" in declined.stderr
    sent = tally(*args, "--yes", "--json")
    assert sent.exit_code == 0, sent.output
    profile_id = Digest(hash_struct(profile_of(model)))
    assert json.loads(sent.stdout)["profile"] == "0x" + profile_id.hex()
    assert "registered already" in tally(*args, "--yes").stdout
    assert json.loads(tally(*args, "--yes", "--json").stdout)["transaction"] is None
