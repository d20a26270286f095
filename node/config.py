"""The node's settings: one frozen tree, read from a TOML file, TALLY_* variables and flags, the later the stronger.

Amounts are written as people say them (TALLY per million tokens, TALLY, `10m`) and held as integers (wei per token,
wei, seconds); an amount that is no whole number of wei is refused, never rounded. `NodeConfig.origins` says for each
key where its value came from. `KEYS` is the table that docs and `tally config` are made from.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from node.config_values import (
    ConfigError,
    Kind,
    bootstrap,
    choice,
    count,
    currency,
    duration,
    factor,
    multiaddrs,
    names,
    optional_path,
    optional_url,
    path,
    paths,
    port,
    price,
    rate,
    size,
    tally,
    text,
    url,
    yes_no,
)
from protocol.units import Wei

__all__ = [
    "KEYS",
    "ChainConfig",
    "ClientConfig",
    "ConfigError",
    "EconomicsConfig",
    "ExchangeConfig",
    "Key",
    "LogConfig",
    "NodeConfig",
    "ProviderConfig",
    "TransportConfig",
    "ValidatorConfig",
    "default_home",
    "load",
]


@dataclass(frozen=True, slots=True)
class ChainConfig:
    """Which chain. `deployment`: the deployment.json that names chain id and contracts."""

    rpc_url: str
    deployment: Path


@dataclass(frozen=True, slots=True)
class TransportConfig:
    """Where peers reach us and whom we ask first. Multiaddrs as text; port 0 takes a free one."""

    listen_host: str
    listen_port: int
    announce: tuple[str, ...]
    bootstrap: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """What is sold. Prices in wei per token; `per_request`, `stake`, `settle_value`, `settle_dust` in wei.

    Vouchers are settled when `settle_value` is due in all, or `settle_interval` s after the last settlement, channels
    below `settle_dust` left out. `threads` 0: the engine's choice. `kv_budget`: bytes. `region`: free text that goes,
    hashed, into the offer. `*_factor`: in basis points. `*_ms`: what a tier promises, 0 for no promise; `refund_share`:
    bps of the metered cost given back when a promise is missed. `base_*_factor`: bounds of the base multiplier, which
    follows utilisation. `reserved_discount`: bps off the price of reserved jobs. `cache_ttl`: s that a kept
    prompt is held, 0 for no promise. `drain`: s that running jobs get when the node stops.
    `upstream`: base URL of the server that computes, "" for the node's own engine; `upstream_private`: it may be
    dialled in a private network. `tariff_file`: a sheet or a signed tariff that stands for all prices above.
    """

    model_dir: Path | None
    model_name: str
    slots: int
    max_queue: int
    dtype: str
    device: str
    compile: str
    kv_budget: int
    threads: int
    prompt_price: Wei
    cached_price: Wei
    completion_price: Wei
    reasoning_price: Wei
    embedding_price: Wei
    per_request: Wei
    flex_factor: int
    standard_factor: int
    priority_factor: int
    flex_ttft_ms: int
    flex_tpot_ms: int
    standard_ttft_ms: int
    standard_tpot_ms: int
    priority_ttft_ms: int
    priority_tpot_ms: int
    refund_share: int
    long_context_threshold: int
    long_context_factor: int
    privacy_factor: int
    base_min_factor: int
    base_max_factor: int
    reserved_discount: int
    cache_ttl: int
    max_output: int
    stake: Wei
    settle_interval: int
    settle_value: Wei
    settle_dust: Wei
    drain: int
    region: str
    retention_hours: int
    appeal: bool
    upstream: str
    upstream_model: str
    upstream_key_file: Path | None
    upstream_private: bool
    tariff_file: Path | None


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """What is bought. `max_price`: most wei one job may cost. `deposit`: wei put into a new channel.

    `max_total`: most wei the session key may ever promise, 0 for no cap. `stall`: s of silence taken for a stall.
    `keep_content`: prompts and transcripts stay for `retention_hours`, so that a job can be audited afterwards.
    `oversight`: look whether providers commit to the jobs bought here, show the Court where they do not, and claim.
    """

    max_price: Wei
    max_total: Wei
    stall: int
    gateway_host: str
    gateway_port: int
    deposit: Wei
    keep_content: bool
    retention_hours: int
    oversight: bool


@dataclass(frozen=True, slots=True)
class ExchangeConfig:
    """A platform outside the market that jobs may be sent to. `ceiling`: most wei per token, prompt or output.

    `tally_usd`: USD that one TALLY is worth, None when nobody said. `models`: (name here, name there).
    """

    enabled: bool
    url: str
    key_file: Path | None
    ceiling: Wei
    tally_usd: Decimal | None
    models: tuple[tuple[str, str], ...]
    private: bool


@dataclass(frozen=True, slots=True)
class ValidatorConfig:
    """What is checked of others' work. `model_dirs`: one per profile that can be replayed. `stake`: wei to hold staked.

    `poll`: s between looks at the Court. `max_audits`: cases whose transcripts are fetched at the same time; replays
    run one after the other whatever it is. `auto_draw`: send the draws and counts that anybody may send.
    """

    model_dirs: tuple[Path, ...]
    stake: Wei
    poll: int
    max_audits: int
    auto_draw: bool
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True, slots=True)
class EconomicsConfig:
    """What serving costs its owner; read by `tally provider economics` and never told to anybody.

    Money of `currency` in units of 10^-12: `price_per_kwh`, `hardware_price`, `tally_rate` (per TALLY, 0 for none).
    `lifetime`: s over which the hardware is written off. `declared_cost`: wei per STE, 0 for none.
    """

    currency: str
    watts_idle: int
    watts_busy: int
    price_per_kwh: int
    hardware_price: int
    lifetime: int
    tally_rate: int
    declared_cost: Wei


@dataclass(frozen=True, slots=True)
class LogConfig:
    """`format` auto: text on a terminal, JSON elsewhere."""

    level: str
    format: str


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """All settings of one node. `origins`: key -> `default`, `file PATH`, `env NAME` or `flag`."""

    home: Path
    password_file: Path | None
    chain: ChainConfig
    transport: TransportConfig
    provider: ProviderConfig
    client: ClientConfig
    exchange: ExchangeConfig
    validator: ValidatorConfig
    economics: EconomicsConfig
    log: LogConfig
    origins: Mapping[str, str]

    @property
    def keys_dir(self) -> Path:
        """Where the key files lie."""
        return self.home / "keys"

    @property
    def journal(self) -> Path:
        """The store's database file."""
        return self.home / "journal.db"


@dataclass(frozen=True, slots=True)
class Key:
    """One setting. `default`: as a person would write it, None for no value.

    In a default `${home}` stands for the data directory.
    """

    name: str
    kind: Kind
    default: Any
    help: str

    @property
    def variable(self) -> str:
        """`provider.model_dir` -> `TALLY_PROVIDER_MODEL_DIR`."""
        return "TALLY_" + self.name.replace(".", "_").upper()


KEYS: Final = (
    Key("password_file", optional_path, None, "file whose first line is the password of the key files"),
    Key("chain.rpc_url", url, "http://127.0.0.1:8545", "JSON-RPC endpoint of the chain"),
    Key("chain.deployment", path, "${home}/deployment.json", "file naming chain id and contract addresses"),
    Key("transport.listen_host", text, "0.0.0.0", "address to listen on for peers"),
    Key("transport.listen_port", port, 4001, "TCP port for peers; 0 takes a free one"),
    Key("transport.announce", multiaddrs, (), "multiaddrs to announce instead of those found"),
    Key("transport.bootstrap", bootstrap, (), "multiaddrs with /p2p/ of the peers to ask first"),
    Key("provider.model_dir", optional_path, None, "Hugging Face model directory to serve"),
    Key("provider.model_name", text, "", "name the model is offered under; empty for the directory's name"),
    Key("provider.slots", count(1, 4096), 8, "generations served at the same time"),
    Key("provider.max_queue", count(0, 1 << 16), 64, "requests that may wait for a slot, priority in all places"),
    Key("provider.dtype", choice("auto", "bf16", "fp32"), "auto", "number format of weights and cache"),
    Key("provider.device", text, "cpu", "where the model computes, as torch names it: cpu, cuda, cuda:1"),
    Key(
        "provider.compile",
        choice("off", "auto", "on"),
        "auto",
        "whether to build and keep kernels with the C compiler",
    ),
    Key("provider.kv_budget", size, "2GiB", "memory for running generations and the prefix cache together"),
    Key("provider.threads", count(0, 4096), 0, "CPU threads for the engine; 0 leaves it to the model's size"),
    Key("provider.prompt_price", price, "0.10", "TALLY per million prompt tokens"),
    Key("provider.cached_price", price, "0.02", "TALLY per million prompt tokens found in the prefix cache"),
    Key("provider.completion_price", price, "0.40", "TALLY per million generated tokens"),
    Key("provider.reasoning_price", price, "0.40", "TALLY per million generated reasoning tokens"),
    Key("provider.embedding_price", price, "0.02", "TALLY per million tokens read by an embedding job"),
    Key("provider.per_request", tally, "0", "TALLY per job, whatever its length"),
    Key("provider.flex_factor", factor, "0.8", "price factor of the flex tier, which promises nothing"),
    Key("provider.standard_factor", factor, "1", "price factor of the standard tier"),
    Key("provider.priority_factor", factor, "1.5", "price factor of the priority tier"),
    Key("provider.flex_ttft_ms", count(0, 3_600_000), 0, "promised ms to the first token, flex; 0 for none"),
    Key("provider.flex_tpot_ms", count(0, 3_600_000), 0, "promised ms a token, flex; 0 for none"),
    Key("provider.standard_ttft_ms", count(0, 3_600_000), 0, "promised ms to the first token, standard; 0 for none"),
    Key("provider.standard_tpot_ms", count(0, 3_600_000), 0, "promised ms a token, standard; 0 for none"),
    Key("provider.priority_ttft_ms", count(0, 3_600_000), 2_000, "promised ms to the first token, priority"),
    Key("provider.priority_tpot_ms", count(0, 3_600_000), 200, "promised ms a token, priority"),
    Key("provider.refund_share", factor, "0.5", "share of the cost given back when a promise or a deadline is missed"),
    Key("provider.long_context_threshold", count(0, (1 << 32) - 1), 32_768, "prompt tokens above which a job is long"),
    Key("provider.long_context_factor", factor, "1", "price factor of long jobs"),
    Key("provider.privacy_factor", factor, "1", "price factor of private jobs"),
    Key("provider.base_min_factor", factor, "1", "price factor that falling load never passes"),
    Key("provider.base_max_factor", factor, "2", "price factor that rising load never passes"),
    Key("provider.reserved_discount", factor, "0.2", "share taken off the price of jobs under a reservation"),
    Key("provider.cache_ttl", count(0, 7 * 86_400), 0, "seconds a kept prompt is promised to stay cached; 0 for none"),
    Key("provider.max_output", count(1, 1 << 20), 8_192, "most output tokens of one job"),
    Key("provider.stake", tally, "100", "TALLY to hold as stake in the Registry"),
    Key("provider.settle_interval", duration, "10m", "longest time between settlements"),
    Key("provider.settle_value", tally, "1", "TALLY due in all that make a settlement worth it at once"),
    Key("provider.settle_dust", tally, "0.0001", "TALLY below which a channel waits, unless its payer's exit is near"),
    Key("provider.drain", duration, "30s", "time that running jobs get to end when the node stops"),
    Key("provider.region", text, "", "where the machine stands, as told in the offer"),
    Key("provider.retention_hours", count(0, 24 * 366), 0, "hours that content is kept beyond what audits need"),
    Key("provider.appeal", yes_no, True, "put up the bond against a verdict of guilty that no planted error explains"),
    Key("provider.upstream", optional_url, "", "OpenAI-compatible server to serve through; empty: compute here"),
    Key("provider.upstream_model", text, "", "the model as that server names it; empty when it has one only"),
    Key("provider.upstream_key_file", optional_path, None, "file whose first line is that server's API key"),
    Key("provider.upstream_private", yes_no, False, "whether that server may be in a private network"),
    Key("provider.tariff_file", optional_path, None, "a price sheet or signed tariff instead of the prices above"),
    Key("client.max_price", tally, "0.1", "most TALLY that one job may cost"),
    Key("client.max_total", tally, "0", "most TALLY the session key may ever promise; 0 for no cap"),
    Key("client.stall", duration, "60s", "silence after which a provider is taken to have stalled"),
    Key("client.gateway_host", text, "127.0.0.1", "address of the OpenAI-compatible gateway"),
    Key("client.gateway_port", port, 8411, "TCP port of the gateway; 0 takes a free one"),
    Key("client.deposit", tally, "1", "TALLY put into the escrow channel with a new provider"),
    Key("client.keep_content", yes_no, True, "keep prompts and transcripts, sealed, so that a job can be audited"),
    Key("client.retention_hours", count(0, 24 * 366), 168, "hours they are kept before their keys are destroyed"),
    Key("client.oversight", yes_no, True, "prove jobs that providers leave out, and claim what cheats owe"),
    Key("exchange.enabled", yes_no, False, "send jobs to a platform outside where that is cheaper, or nobody else is"),
    Key("exchange.url", optional_url, "", "base URL of that platform, such as https://openrouter.ai/api/v1"),
    Key("exchange.key_file", optional_path, None, "file whose first line is the API key there"),
    Key("exchange.ceiling", price, "0", "most TALLY per million tokens, prompt or output, that is paid there"),
    Key("exchange.tally_usd", rate, None, "USD that one TALLY is worth; without it nothing is compared or sent"),
    Key("exchange.models", names, (), "models that have another name there, as NAME=THEIRS"),
    Key("exchange.private", yes_no, False, "whether that platform may be in a private network"),
    Key("validator.model_dirs", paths, (), "Hugging Face model directories whose profiles this node can replay"),
    Key("validator.stake", tally, "100", "TALLY to hold as stake in the Registry; the Court names the least"),
    Key("validator.poll", duration, "2s", "time between looks at the Court"),
    Key("validator.max_audits", count(1, 64), 4, "cases whose transcripts are fetched at the same time"),
    Key("validator.auto_draw", yes_no, True, "whether to send the draws and counts that anybody may send"),
    Key("validator.dtype", choice("auto", "bf16", "fp32"), "auto", "number format of the weights that are replayed"),
    Key("validator.device", text, "cpu", "where replays compute, as torch names it: cpu, cuda, cuda:1"),
    Key("validator.threads", count(0, 4096), 0, "CPU threads of a replay; 0 leaves it to the model's size"),
    Key("economics.currency", text, "EUR", "name of the money that the other economics settings are in"),
    Key("economics.watts_idle", count(0, 10_000_000), 0, "watts the machine draws when nothing is generated"),
    Key("economics.watts_busy", count(0, 10_000_000), 0, "watts it draws while a job runs"),
    Key("economics.price_per_kwh", currency, "0", "price of a kilowatt hour"),
    Key("economics.hardware_price", currency, "0", "what the machine cost"),
    Key("economics.lifetime", duration, "1095d", "time over which the machine is written off"),
    Key("economics.tally_rate", currency, "0", "what one TALLY is worth; 0 compares nothing"),
    Key("economics.declared_cost", tally, "0", "TALLY per STE declared as cost; 0 for none"),
    Key("log.level", choice("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", "least severity that is logged"),
    Key("log.format", choice("auto", "json", "text"), "auto", "form of the log; auto is text on a terminal"),
)
"""Every key but `home`, which says where the file with the others is."""

_BY_NAME: Final = {key.name: key for key in KEYS}
_BY_VARIABLE: Final = {key.variable: key for key in KEYS}

OTHER_VARIABLES: Final = frozenset({"TALLY_HOME", "TALLY_CONFIG", "TALLY_SCRYPT_N", "TALLY_CRASH_AT"})
"""Variables of ours that are no keys. Those beginning with a prefix of OTHER_PREFIXES are of tests and tools."""

OTHER_PREFIXES: Final = ("TALLY_TEST_", "TALLY_DEVNET_", "TALLY_BENCH_")


def default_home(env: Mapping[str, str]) -> Path:
    """$TALLY_HOME, else $XDG_DATA_HOME/tallystick, else ~/.local/share/tallystick."""
    if env.get("TALLY_HOME"):
        return Path(env["TALLY_HOME"]).expanduser()
    base = env.get("XDG_DATA_HOME", "")
    # The XDG specification says that a relative path there is to be ignored.
    root = Path(base) if base.startswith("/") else Path(env.get("HOME") or "~").expanduser() / ".local" / "share"
    return root / "tallystick"


def load(
    flags: Mapping[str, Any] | None = None, *, file: Path | None = None, env: Mapping[str, str] | None = None
) -> NodeConfig:
    """Read the settings. `flags`: key -> value, None for a flag not given; `home` is allowed among them.

    `file`: a TOML file that must exist; without it $TALLY_CONFIG, which must exist, or config.toml in the data
    directory if there is one. `env`: the process's environment when None.
    Raises: ConfigError naming the key, where it was written, and the form it should have.
    """
    env = os.environ if env is None else env
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    home_origin = "flag" if "home" in given else "env TALLY_HOME" if env.get("TALLY_HOME") else "default"
    home = Path(given.pop("home", None) or default_home(env)).expanduser().absolute()
    raw: dict[str, tuple[Any, str]] = {key.name: (key.default, "default") for key in KEYS}
    raw.update(_from_file(file, env, home))
    raw.update(_from_env(env))
    for name, value in given.items():
        if name not in _BY_NAME:
            raise ConfigError(name, "flag", f"unknown key{_suggest(name, ['home', *_BY_NAME])}")
        raw[name] = (value, "flag")
    values = {name: _parse(_BY_NAME[name], value, origin, home) for name, (value, origin) in raw.items()}
    return _build(home, values, {"home": home_origin, **{name: origin for name, (_, origin) in raw.items()}})


def _parse(key: Key, value: Any, origin: str, home: Path) -> Any:
    if origin == "default" and isinstance(value, str):
        value = value.replace("${home}", str(home))
    try:
        return key.kind.parse(value)
    except (ValueError, ArithmeticError) as exc:
        raise ConfigError(key.name, origin, f"{exc}; expected {key.kind.form}") from exc


def _build(home: Path, values: Mapping[str, Any], origins: dict[str, str]) -> NodeConfig:
    def section(name: str) -> dict[str, Any]:
        return {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{name}.")}

    return NodeConfig(
        home=home,
        password_file=values["password_file"],
        chain=ChainConfig(**section("chain")),
        transport=TransportConfig(**section("transport")),
        provider=ProviderConfig(**section("provider")),
        client=ClientConfig(**section("client")),
        exchange=ExchangeConfig(**section("exchange")),
        validator=ValidatorConfig(**section("validator")),
        economics=EconomicsConfig(**section("economics")),
        log=LogConfig(**section("log")),
        origins=MappingProxyType(origins),
    )


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


# -------------------------------------------------------------------------------------------------------------- sources


def _from_file(file: Path | None, env: Mapping[str, str], home: Path) -> dict[str, tuple[Any, str]]:
    """Key -> (value, origin) of the TOML file, tables flattened. Raises: ConfigError."""
    named = file or (Path(env["TALLY_CONFIG"]).expanduser() if env.get("TALLY_CONFIG") else None)
    used = named or home / "config.toml"
    try:
        # Decimal, so that 0.1 written as a number is exactly 0.1.
        tree = tomllib.loads(used.read_text(), parse_float=Decimal)
    except FileNotFoundError as exc:
        if named is None:
            return {}
        raise ConfigError("", f"file {used}", "the file does not exist") from exc
    except OSError as exc:
        raise ConfigError("", f"file {used}", f"the file cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise ConfigError("", f"file {used}", f"no TOML: {exc}") from exc
    out: dict[str, tuple[Any, str]] = {}
    for name, value in _flatten(tree, ""):
        if name not in _BY_NAME:
            raise ConfigError(name, f"file {used}", f"unknown key{_suggest(name, list(_BY_NAME))}")
        out[name] = (value, f"file {used}")
    return out


def _flatten(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            out.extend(_flatten(value, f"{prefix}{name}."))
        elif not isinstance(value, dict):
            out.append((f"{prefix}{name}", value))
    return out


def _from_env(env: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """Key -> (value, origin) of the TALLY_ variables. Raises: ConfigError for one that is no key."""
    out: dict[str, tuple[Any, str]] = {}
    for variable, value in env.items():
        if not variable.startswith("TALLY_") or variable in OTHER_VARIABLES or variable.startswith(OTHER_PREFIXES):
            continue
        key = _BY_VARIABLE.get(variable)
        if key is None:
            hint = _suggest(variable, [*_BY_VARIABLE, *OTHER_VARIABLES])
            if variable.endswith("PASSWORD"):
                hint = "; a password is never read from the environment: write it to a file, TALLY_PASSWORD_FILE=PATH"
            raise ConfigError("", f"env {variable}", f"unknown variable{hint}")
        out[key.name] = (value, f"env {variable}")
    return out
