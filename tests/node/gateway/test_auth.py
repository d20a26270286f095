"""API keys: shown once, stored as hashes, in a file nobody else can read."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from node.gateway.auth import ApiKeys
from node.gateway.errors import GatewayError
from tests.node.gateway.serving import ManualClock, Seeded


def keys(path: Path) -> ApiKeys:
    return ApiKeys(path, clock=ManualClock(), entropy=Seeded())


def test_a_key_opens_and_is_stored_as_a_hash_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "keys.json"
    made = keys(path)
    text = made.create("laptop")
    assert text.startswith("sk-tally-") and len(text) > 50
    assert text not in path.read_text() and text.removeprefix("sk-tally-") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = made.check(f"Bearer {text}")
    assert found is not None and (found.name, found.created) == ("laptop", 1_800_000_000)
    assert keys(path).check(f"bearer {text}") == found


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic {}", "{}", "Bearer {}x", "Bearer \udcff"])
def test_anything_else_does_not_open(tmp_path: Path, header: str | None) -> None:
    made = keys(tmp_path / "keys.json")
    text = made.create("laptop")
    assert made.check(header and header.format(text)) is None


def test_keys_made_and_revoked_elsewhere_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    serving, elsewhere = keys(path), keys(path)
    assert serving.check("Bearer x") is None
    text = elsewhere.create("phone")
    assert serving.check(f"Bearer {text}") is not None
    assert elsewhere.revoke("phone") and not elsewhere.revoke("phone")
    assert serving.check(f"Bearer {text}") is None


def test_names_are_unique(tmp_path: Path) -> None:
    made = keys(tmp_path / "keys.json")
    made.create("laptop")
    for name in ("laptop", " "):
        with pytest.raises(GatewayError):
            made.create(name)


def test_a_broken_file_lets_nobody_in_and_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("{")
    with pytest.raises(GatewayError, match=r"keys\.json.*left as it is"):
        keys(path).check("Bearer x")
    with pytest.raises(GatewayError):
        keys(path).create("laptop")
    assert path.read_text() == "{"
