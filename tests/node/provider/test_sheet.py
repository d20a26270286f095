"""From settings to the price sheet that is signed: nothing is lost on the way, and the defaults are a valid sheet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from node.config import load
from node.tariff_sheet import wanted_tariff
from protocol.errors import FieldOutOfRange
from protocol.messages import Tariff
from protocol.tariff import check_tariff
from protocol.units import ZERO_ADDRESS, ZERO_DIGEST


def sheet(home: Path, **flags: str) -> Tariff:
    given = {f"provider.{name}": value for name, value in flags.items()}
    wanted = wanted_tariff(load({"home": home, **given}, env={}), ZERO_ADDRESS, ZERO_DIGEST)
    return replace(wanted, valid_until=1)


def test_the_defaults_are_a_valid_sheet_whose_multiplier_may_double(tmp_path: Path) -> None:
    tariff = sheet(tmp_path)
    check_tariff(tariff)
    assert (tariff.base_min_bps, tariff.base_max_bps, tariff.reserved_discount_bps) == (10_000, 20_000, 2_000)
    assert (tariff.embedding_price, tariff.cache_ttl_s) == (2 * 10**10, 0)


@pytest.mark.parametrize(
    ("key", "written", "field", "meant"),
    [
        ("embedding_price", "0.5", "embedding_price", 5 * 10**11),
        ("cache_ttl", "300", "cache_ttl_s", 300),
        ("base_min_factor", "0.5", "base_min_bps", 5_000),
        ("base_max_factor", "3", "base_max_bps", 30_000),
        ("reserved_discount", "0.35", "reserved_discount_bps", 3_500),
        ("flex_ttft_ms", "9000", "flex_ttft_ms", 9_000),
        ("flex_tpot_ms", "700", "flex_tpot_ms", 700),
        ("refund_share", "0.1", "flex_refund_bps", 1_000),
    ],
)
def test_each_setting_is_its_field(tmp_path: Path, key: str, written: str, field: str, meant: int) -> None:
    assert getattr(sheet(tmp_path, **{key: written}), field) == meant


@pytest.mark.parametrize(
    "flags",
    [{"base_min_factor": "3"}, {"base_min_factor": "0"}, {"reserved_discount": "1.1"}, {"base_max_factor": "99"}],
)
def test_a_sheet_that_contradicts_itself_is_refused(tmp_path: Path, flags: dict[str, str]) -> None:
    with pytest.raises(FieldOutOfRange):
        check_tariff(sheet(tmp_path, **flags))
