"""Crash points: named, counted, harmless when not armed."""

from __future__ import annotations

import typing
from collections.abc import Iterator

import pytest

from incentives.ledger import Record
from node import crashpoints
from node.crashpoints import CRASH_POINTS, arm, crash_point, declare


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    signals: list[int] = []
    monkeypatch.setattr(crashpoints.os, "kill", lambda _pid, number: signals.append(number))
    yield signals
    arm("")


def test_every_kind_of_record_has_its_points() -> None:
    kinds = [kind.__name__ for kind in typing.get_args(Record)]
    names = {f"store.{kind}.{when}" for kind in ["write", *kinds] for when in ("before", "after")}
    assert names <= set(CRASH_POINTS)


def test_it_dies_at_the_pass_it_was_told(killed: list[int]) -> None:
    arm("store.write.after:3")
    for _ in range(2):
        crash_point("store.write.after")
        crash_point("store.write.before")
    assert killed == []
    crash_point("store.write.after")
    assert killed == [9]


def test_another_folder_declares_its_own(killed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crashpoints, "CRASH_POINTS", dict(CRASH_POINTS))
    name = declare("test.point")
    assert name in crashpoints.CRASH_POINTS
    arm(name)
    crash_point(name)
    assert killed == [9]


@pytest.mark.parametrize("spec", ["x:0", "x:-1", "x:many", "x:1.5"])
def test_a_count_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="TALLY_CRASH_AT"):
        arm(spec)
    arm("")
