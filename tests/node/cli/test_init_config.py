"""A fresh home: made once, private, explained, and never overwritten."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from node import config as settings
from node.cli.config import human
from node.keys import addresses
from tests.node.cli.conftest import Tally


def test_init_makes_a_private_home_and_leaves_what_is_there(home: Path, tally: Tally) -> None:
    made = json.loads(tally("init", "--json").stdout)
    assert set(made["keys"]) == {"wallet", "node", "session"} and len(made["made"]) == 5
    for file in (home / "password", home / "config.toml", *(home / "keys").iterdir()):
        assert file.stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    again = tally("init")
    assert again.exit_code == 0 and "nothing was changed" in again.stdout
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before
    assert {name: "0x" + a.hex() for name, a in addresses(home / "keys").items()} == made["keys"]
    assert (home / "password").read_text().strip() not in again.output


def test_the_template_names_every_key_and_changes_nothing(home: Path, tally: Tally) -> None:
    tally("init")
    text = (home / "config.toml").read_text()
    plain = settings.load({"home": home}, env={}, file=home / "config.toml")
    assert set(plain.origins.values()) == {"default", "flag"}
    # Every line that is commented out is a valid setting, and says what is the default anyway.
    lines = [line[2:] if line.startswith("# ") and " = " in line else line for line in text.splitlines()]
    opened = home / "opened.toml"
    opened.write_text("\n".join(line for line in lines if not line.startswith("#")))
    assert tomllib.loads(opened.read_text())["chain"]["deployment"] == str(home / "deployment.json")
    again = settings.load({"home": home}, env={}, file=opened)
    assert [human(key, again) for key in settings.KEYS] == [human(key, plain) for key in settings.KEYS]
    assert all(again.origins[key.name].startswith("file") for key in settings.KEYS)


def test_show_gives_values_in_the_files_form_with_their_origin(
    home: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "config.toml").write_text(
        '[provider]\nprompt_price = "0.05"\nsettle_interval = "2m"\nflex_factor = "0.75"\n'
    )
    monkeypatch.setenv("TALLY_CLIENT_DEPOSIT", "2.50")
    found = json.loads(tally("config", "show", "--json").stdout)
    assert found["provider.prompt_price"] == {"value": "0.05", "origin": f"file {home / 'config.toml'}"}
    assert found["client.deposit"] == {"value": "2.5", "origin": "env TALLY_CLIENT_DEPOSIT"}
    assert found["provider.settle_interval"]["value"] == "120s"
    assert found["provider.flex_factor"]["value"] == "0.75"
    assert found["home"] == {"value": str(home), "origin": "flag"}
    text = tally("config", "show", "--origin").stdout
    assert "env TALLY_CLIENT_DEPOSIT" in text
    assert "ORIGIN" not in tally("config", "show").stdout


def test_api_keys_are_made_listed_and_revoked(home: Path, tally: Tally) -> None:
    made = json.loads(tally("gateway", "key", "create", "laptop", "--json").stdout)
    assert made["api_key"].startswith("sk-tally-")
    assert tally("gateway", "key", "create", "laptop").exit_code == 1
    (listed,) = json.loads(tally("gateway", "key", "list", "--json").stdout)
    assert listed["name"] == "laptop"
    assert made["api_key"] not in tally("gateway", "key", "list").output
    assert tally("gateway", "key", "revoke", "laptop").exit_code == 0
    assert tally("gateway", "key", "revoke", "laptop").exit_code == 1
