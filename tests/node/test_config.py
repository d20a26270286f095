"""Settings: precedence, exact amounts, and errors that name key, place and form."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config import KEYS, ConfigError, NodeConfig, default_home, load
from protocol.units import MAX_AMOUNT, WEI_PER_TALLY


def _load(tmp_path: Path, toml: str = "", env: dict[str, str] | None = None, **flags: Any) -> NodeConfig:
    if toml:
        (tmp_path / "config.toml").write_text(toml)
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return load(named, env={"TALLY_HOME": str(tmp_path), "PATH": "/bin", **(env or {})})


def test_flags_beat_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    toml = "[provider]\nslots = 2\nregion = 'eu'\ndtype = 'fp32'\n"
    env = {"TALLY_PROVIDER_SLOTS": "3", "TALLY_PROVIDER_REGION": "us"}
    made = _load(tmp_path, toml, env, provider__slots=4, provider__threads=None)
    assert (made.provider.slots, made.provider.region, made.provider.dtype, made.provider.threads) == (
        4,
        "us",
        "fp32",
        0,
    )
    assert made.origins["provider.slots"] == "flag"
    assert made.origins["provider.region"] == "env TALLY_PROVIDER_REGION"
    assert made.origins["provider.dtype"] == f"file {tmp_path / 'config.toml'}"
    assert made.origins["provider.threads"] == "default"
    assert made.origins["home"] == "env TALLY_HOME"


def test_every_key_has_a_field_an_origin_a_default_and_its_own_variable(tmp_path: Path) -> None:
    made = _load(tmp_path)
    names = {key.name for key in KEYS}
    assert set(made.origins) == names | {"home"}
    sections = ("chain", "transport", "provider", "client", "exchange", "validator", "economics", "log")
    found = {f"{section}.{field.name}" for section in sections for field in fields(getattr(made, section))}
    assert found | {"password_file"} == names
    assert len({key.variable for key in KEYS}) == len(KEYS)
    assert all(key.help and key.kind.form for key in KEYS)
    with pytest.raises(FrozenInstanceError):
        made.provider.slots = 3  # type: ignore[misc]


def test_the_data_directory(tmp_path: Path) -> None:
    assert default_home({"TALLY_HOME": "/data", "HOME": "/home/me"}) == Path("/data")
    assert default_home({"XDG_DATA_HOME": "/xdg", "HOME": "/home/me"}) == Path("/xdg/tallystick")
    assert default_home({"XDG_DATA_HOME": "relative", "HOME": "/home/me"}) == Path("/home/me/.local/share/tallystick")
    made = load({"home": str(tmp_path)}, env={"HOME": "/home/me"})
    assert (made.home, made.journal, made.keys_dir) == (tmp_path, tmp_path / "journal.db", tmp_path / "keys")
    assert made.chain.deployment == tmp_path / "deployment.json"
    assert made.origins["home"] == "flag"


@pytest.mark.parametrize(
    ("written", "size"),
    [("2GiB", 2 << 30), ("1.5 GiB", 3 << 29), ("512MiB", 512 << 20), ("4096", 4096), (4096, 4096), ("1B", 1)],
)
def test_sizes_are_powers_of_1024_or_bytes(written: object, size: int, tmp_path: Path) -> None:
    assert _load(tmp_path, provider__kv_budget=written).provider.kv_budget == size


@pytest.mark.parametrize("written", ["2GB", "2G", "0", "-1GiB", "0.3B", "much", True, "1e9", "9999999TiB"])
def test_what_is_no_size_is_refused(written: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"provider.kv_budget .* expected a size such as 512MiB"):
        _load(tmp_path, provider__kv_budget=written)


def test_amounts_are_written_as_people_say_them_and_held_in_wei(tmp_path: Path) -> None:
    toml = (
        "[provider]\nprompt_price = 0.1\ncached_price = '0.000000000001'\ncompletion_price = 2\nstake = '1_000'\n"
        "settle_interval = '2h'\nreasoning_price = 0\n[client]\nmax_price = 0.000000000000000001\n"
    )
    made = _load(tmp_path, toml, {"TALLY_CLIENT_DEPOSIT": "1.5"})
    assert made.provider.prompt_price == 10**11, "0.1 TALLY per million tokens, exactly, though TOML calls it a float"
    assert made.provider.cached_price == 1
    assert made.provider.completion_price == 2 * 10**12
    assert made.provider.reasoning_price == 0, "a price of nothing is legal"
    assert made.provider.stake == 1000 * WEI_PER_TALLY
    assert made.provider.settle_interval == 7200
    assert made.client.max_price == 1
    assert made.client.deposit == 15 * 10**17


@given(st.integers(0, MAX_AMOUNT))
def test_every_amount_in_wei_can_be_written(wei: int) -> None:
    text = f"{wei // WEI_PER_TALLY}.{wei % WEI_PER_TALLY:018d}"
    assert load({"client.deposit": text}, env={"HOME": "/nowhere"}).client.deposit == wei


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("provider.prompt_price", "0.0000000000001", "no whole number of wei"),
        ("provider.prompt_price", 0.1, "no decimal number"),
        ("provider.prompt_price", "-1", "no decimal number"),
        ("provider.prompt_price", "1e3", "no decimal number"),
        ("provider.prompt_price", Decimal("-1"), "out of range"),
        ("provider.prompt_price", Decimal("nan"), "no decimal number"),
        ("provider.stake", "0.0000000000000000001", "no whole number of wei"),
        ("provider.stake", "1" + "0" * 30, "out of range"),
        ("provider.stake", True, "no decimal number"),
        ("provider.slots", "0", "out of range"),
        ("provider.slots", "two", "no whole number"),
        ("provider.slots", 1.0, "no whole number"),
        ("provider.dtype", "int4", "none of them; expected one of auto, bf16"),
        ("provider.flex_factor", "0.00001", "no factor from 0 to 100"),
        ("provider.flex_factor", "101", "no factor from 0 to 100"),
        ("provider.settle_interval", "0s", "no duration; expected a duration above zero such as 90s"),
        ("provider.settle_interval", "5 weeks", "no duration"),
        ("provider.settle_interval", True, "no duration"),
        ("transport.listen_port", "70000", "out of range"),
        ("transport.announce", "host:1", "no multiaddr"),
        ("transport.bootstrap", "/ip4/1.2.3.4/tcp/1", "does not name its peer"),
        ("transport.bootstrap", 5, "no list"),
        ("chain.rpc_url", "localhost:8545", "no URL"),
        ("chain.deployment", "", "the path is empty"),
        ("provider.region", 5, "no text"),
    ],
)
def test_a_wrong_value_is_refused_with_key_place_and_form(tmp_path: Path, key: str, value: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({key: value}, env={"TALLY_HOME": str(tmp_path)})
    assert (caught.value.key, caught.value.origin) == (key, "flag")
    assert problem in str(caught.value) and "expected" in str(caught.value)


def test_lists_and_paths_and_words_in_their_several_forms(tmp_path: Path) -> None:
    peer = "/ip4/203.0.113.7/tcp/4001/p2p/16Uiu2HAm"
    toml = f"password_file = '~/secret'\n[transport]\nbootstrap = ['{peer}', '{peer}2']\n[log]\nlevel = 'debug'\n"
    made = _load(tmp_path, toml, {"TALLY_TRANSPORT_ANNOUNCE": "/dns4/a/tcp/1, /dns4/b/tcp/2"})
    assert made.transport.bootstrap == (peer, f"{peer}2")
    assert made.transport.announce == ("/dns4/a/tcp/1", "/dns4/b/tcp/2")
    assert made.password_file == Path("~/secret").expanduser()
    assert made.log.level == "DEBUG"
    assert _load(tmp_path, "", provider__model_dir=tmp_path / "m").provider.model_dir == tmp_path / "m"
    assert _load(tmp_path, "", provider__model_dir="").provider.model_dir is None


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("[provider]\nslot = 2\n", "provider.slot (file {file}): unknown key; did you mean provider.slots?"),
        ("[providers]\nslots = 2\n", "providers.slots (file {file}): unknown key; did you mean provider.slots?"),
        ("[elsewhere]\nqqq = 2\n", "elsewhere.qqq (file {file}): unknown key"),
        ("provider = 5\n", "provider (file {file}): unknown key"),
        ("[provider\n", "configuration (file {file}): no TOML"),
    ],
)
def test_a_key_that_is_none_is_refused_with_the_nearest(tmp_path: Path, toml: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, toml)
    assert str(caught.value).startswith(problem.format(file=tmp_path / "config.toml"))


def test_flags_and_variables_that_are_none_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean chain\.rpc_url"):
        _load(tmp_path, chain__rpc_uri="http://x")
    with pytest.raises(ConfigError, match="did you mean TALLY_CHAIN_RPC_URL"):
        _load(tmp_path, env={"TALLY_CHAIN_RPC_URI": "http://x"})
    with pytest.raises(ConfigError, match="never read from the environment.*TALLY_PASSWORD_FILE"):
        _load(tmp_path, env={"TALLY_PASSWORD": "hunter2"})
    _load(tmp_path, env={"TALLY_SCRYPT_N": "8192", "TALLY_TEST_ANYTHING": "1", "OTHER": "x"})


def test_a_named_file_must_exist_the_usual_one_need_not(tmp_path: Path) -> None:
    _load(tmp_path)
    missing = tmp_path / "missing.toml"
    with pytest.raises(ConfigError, match="does not exist"):
        load(file=missing, env={"TALLY_HOME": str(tmp_path)})
    with pytest.raises(ConfigError, match="does not exist"):
        _load(tmp_path, env={"TALLY_CONFIG": str(missing)})
    with pytest.raises(ConfigError, match="cannot be read"):
        load(file=tmp_path, env={"TALLY_HOME": str(tmp_path)})
    missing.write_text("[log]\nformat = 'json'\n")
    assert _load(tmp_path, env={"TALLY_CONFIG": str(missing)}).log.format == "json"


def test_the_exchange_is_off_and_its_rate_is_exact(tmp_path: Path) -> None:
    off = _load(tmp_path).exchange
    assert not off.enabled and off.tally_usd is None and off.models == ()
    env = {
        "TALLY_EXCHANGE_ENABLED": "yes",
        "TALLY_EXCHANGE_URL": "https://openrouter.ai/api/v1",
        "TALLY_EXCHANGE_CEILING": "2.5",
        "TALLY_EXCHANGE_TALLY_USD": "0.1",
        "TALLY_EXCHANGE_MODELS": "small=meta-llama/llama-3.2-1b-instruct, big = x/y",
    }
    on = load({"home": str(tmp_path)}, env=env).exchange
    assert on.enabled and on.tally_usd == Decimal("0.1") and on.ceiling == 25 * 10**11
    assert on.models == (("small", "meta-llama/llama-3.2-1b-instruct"), ("big", "x/y"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exchange.enabled", "perhaps"),
        ("exchange.tally_usd", "0"),
        ("exchange.tally_usd", "-1"),
        ("exchange.tally_usd", 0.1),
        ("exchange.models", "small"),
        ("exchange.models", "=x"),
        ("exchange.url", "file:///etc/passwd"),
        ("provider.upstream", "localhost"),
    ],
)
def test_what_the_exchange_cannot_mean_is_refused(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError):
        load({"home": str(tmp_path), name: value}, env={})
