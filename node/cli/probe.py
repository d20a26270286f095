"""What `tally doctor` looks at. Each probe reads and changes nothing; each finding says how to mend what it found."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from node.cli import money
from node.keys import addresses, key_path, load, read_password
from protocol.errors import TallyError
from protocol.units import Address

if TYPE_CHECKING:
    from node.chain.deployment import Deployment
    from node.config import NodeConfig

RPC_TIMEOUT_S: Final = 5.0
FREE_BYTES: Final = 200 << 20
"""Free disk below which we warn. Unit: bytes. The journal keeps three backups of itself and refuses work when full."""

SKEW_WARN_S: Final = 5
"""Clock difference to the chain worth a warning. Unit: s. Peers refuse receipts whose times are further off."""

STALE_S: Final = 300
"""Age of the chain's head that suggests a chain, or a clock, that stands still. Unit: s. 25 slots of 12 seconds."""

_BALANCE_OF: Final = "0x70a08231"
"""Selector of balanceOf(address), ERC-20."""


class Level(StrEnum):
    """WARN: works, but not as one may expect. FAIL: something will not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `mend`: what to do about it, "" when nothing."""

    name: str
    level: Level
    detail: str
    mend: str = ""


def ok(name: str, detail: str) -> Finding:
    """Nothing to do."""
    return Finding(name, Level.OK, detail)


def warn(name: str, detail: str, mend: str) -> Finding:
    """Worth knowing."""
    return Finding(name, Level.WARN, detail, mend)


def fail(name: str, detail: str, mend: str) -> Finding:
    """Will not work."""
    return Finding(name, Level.FAIL, detail, mend)


def probes(config: NodeConfig, *, running: bool) -> Iterator[Finding]:
    """All findings, one by one as they are made. `running`: a node answers in this home."""
    yield from software()
    yield home(config)
    yield from keys(config)
    yield settings(config)
    yield journal(config, running=running)
    yield from ports(config, running=running)
    yield model(config)
    yield bootstrap(config)
    yield from chain(config)


# ------------------------------------------------------------------------------------------------------- this machine


def software() -> Iterator[Finding]:
    """Python, torch, and the library that libp2p needs from the system."""
    yield ok("python", ".".join(map(str, sys.version_info[:3])))  # pip refuses to install on one that is too old
    try:
        yield ok("torch", version("torch"))
    except PackageNotFoundError:
        yield fail("torch", "not installed", "pip install -c constraints.txt torch; only providers need it")
    try:
        importlib.import_module("fastecdsa.curvemath")
        yield ok("gmp", "libgmp is loaded by fastecdsa, which libp2p uses")
    except ImportError as exc:
        yield fail("gmp", f"fastecdsa does not load: {exc}", "apt-get install libgmp10, then reinstall fastecdsa")


def home(config: NodeConfig) -> Finding:
    """The data directory: there, ours alone, with room."""
    path = config.home
    if not path.is_dir():
        return fail("home", f"{path} does not exist", "tally init")
    found = path.stat()
    if found.st_uid != os.getuid() or not os.access(path, os.W_OK | os.X_OK):
        return fail("home", f"{path} is not this user's to write", f"chown -R $USER {path}")
    if found.st_mode & 0o077:
        return warn("home", f"{path} is open to other users (mode {found.st_mode & 0o777:o})", f"chmod 700 {path}")
    free = shutil.disk_usage(path).free
    if free < FREE_BYTES:
        return warn("home", f"only {free >> 20} MiB free under {path}", "free disk space: a full disk stops all work")
    return ok("home", f"{path}, {free >> 30} GiB free")


def keys(config: NodeConfig) -> Iterator[Finding]:
    """The password file, the key files, and whether one opens the other."""
    file = config.password_file or config.home / "password"
    try:
        password = read_password(file)
        yield ok("password file", str(file))
    except TallyError as exc:
        yield fail("password file", str(exc), "tally init makes one; or --password-file names another")
        return
    try:
        found = addresses(config.keys_dir) if config.keys_dir.is_dir() else {}
    except TallyError as exc:
        yield fail("keys", str(exc), "restore the key file from your copy")
        return
    if "wallet" not in found:
        yield fail("keys", f"there is no wallet in {config.keys_dir}", "tally init, or tally wallet import FILE")
        return
    named = ", ".join(f"{name} 0x{address.hex()}" for name, address in found.items())
    try:
        load(config.keys_dir, "wallet", password)
        yield ok("keys", f"{named}; the password opens {key_path(config.keys_dir, 'wallet').name}")
    except TallyError as exc:
        yield fail("keys", str(exc), "give the password file the wallet was made with")


def settings(config: NodeConfig) -> Finding:
    """Where the settings come from."""
    sources = sorted({origin for origin in config.origins.values() if origin != "default"})
    return ok("settings", f"from {', '.join(sources)}" if sources else "all defaults")


def journal(config: NodeConfig, *, running: bool) -> Finding:
    """SQLite's own check, on a connection that cannot write."""
    path = config.journal
    if not path.exists():
        return ok("journal", "none yet; the first job makes it")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            said = [str(row[0]) for row in connection.execute("PRAGMA quick_check(3)")]
    except sqlite3.Error as exc:
        said = [str(exc)]
    if said == ["ok"]:
        used = ", in use by the running node" if running else ""
        return ok("journal", f"{path} is whole ({path.stat().st_size >> 10} KiB{used})")
    return fail(
        "journal",
        f"{path} is damaged: {'; '.join(said)}",
        f"stop the node, move it aside, and put back the newest file of {path.parent / 'backups'}",
    )


def ports(config: NodeConfig, *, running: bool) -> Iterator[Finding]:
    """Whether the two ports can be had."""
    wanted = (
        ("peer port", config.transport.listen_host, config.transport.listen_port, "transport.listen_port"),
        ("gateway port", config.client.gateway_host, config.client.gateway_port, "client.gateway_port"),
    )
    for name, host, port, key in wanted:
        taken = None if port == 0 else _taken(host, port)
        if taken is None:
            yield ok(name, f"{host}:{port} is free" if port else "any free one is taken")
        elif running:
            yield ok(name, f"{host}:{port} is in use, and a node runs in this home")
        else:
            yield warn(name, f"{host}:{port} cannot be had: {taken}", f"stop what uses it, or set {key}")


def _taken(host: str, port: int) -> str | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            return "another program uses it" if exc.errno == errno.EADDRINUSE else str(exc.strerror or exc)
    return None


def model(config: NodeConfig) -> Finding:
    """The model directory, if one is set."""
    directory = config.provider.model_dir
    if directory is None:
        return ok("model", "none set; only `tally provider run` needs one")
    missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
    if not list(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        return fail("model", f"{directory} lacks {', '.join(missing)}", "name a Hugging Face model directory")
    return ok("model", str(directory))


def bootstrap(config: NodeConfig) -> Finding:
    """Whom to ask first."""
    peers = config.transport.bootstrap
    if not peers:
        mend = "set transport.bootstrap, or give --bootstrap, with an address a provider prints at its start"
        return warn("bootstrap", "no peer to ask first: this node knows only who dials in", mend)
    return ok("bootstrap", f"{len(peers)} peers")


# ----------------------------------------------------------------------------------------------------------- the chain


def chain(config: NodeConfig) -> Iterator[Finding]:
    """Deployment file, RPC, contracts, clock, balances."""
    from node.chain.deployment import Deployment

    try:
        deployment = Deployment.load(config.chain.deployment)
        yield ok("deployment", f"{config.chain.deployment}: chain {deployment.chain_id}")
    except TallyError as exc:
        yield fail(
            "deployment", str(exc), "take deployment.json from whoever deployed the contracts (chain.deployment)"
        )
        return
    url = config.chain.rpc_url
    if not url.startswith("http"):
        yield warn(
            "rpc", f"{url} is no HTTP endpoint and was not tried", "set chain.rpc_url to the http(s) one to test it"
        )
        return
    try:
        found = int(_rpc(url, "eth_chainId"), 16)
        if found != deployment.chain_id:
            said = f"{url} serves chain {found}, the deployment is on {deployment.chain_id}"
            yield fail("rpc", said, "set chain.rpc_url or chain.deployment so that they agree")
            return
        yield ok("rpc", f"{url} answers, chain {found}")
        yield contracts(url, deployment)
        yield clock(url)
        yield from balances(url, deployment, config)
    except RpcFailed as exc:
        yield fail("rpc", f"{url} does not answer: {exc}", "start the chain's node, or set chain.rpc_url")


def contracts(url: str, deployment: Deployment) -> Finding:
    """Whether there is code at each address. Raises: RpcFailed."""
    bare = [
        f"{name} 0x{address.hex()}"
        for name, address in (
            ("token", deployment.token),
            ("escrow", deployment.escrow),
            ("registry", deployment.registry),
            ("reservations", deployment.reservations),
        )
        if _rpc(url, "eth_getCode", f"0x{address.hex()}", "latest") in ("0x", None)
    ]
    if bare:
        return fail(
            "contracts", f"no code at {', '.join(bare)}", "the chain was started afresh: take its deployment.json"
        )
    return ok("contracts", "token, escrow, registry and reservations have code")


def clock(url: str) -> Finding:
    """This machine's clock against the newest block's. Raises: RpcFailed."""
    head = _rpc(url, "eth_getBlockByNumber", "latest", False)
    behind = time.time() - int(head["timestamp"], 16)
    if behind < -SKEW_WARN_S:
        mend = "set the clock (timedatectl set-ntp true); providers refuse jobs from a clock that is off"
        return fail("clock", f"this machine is {-behind:.0f} s behind block {int(head['number'], 16)}", mend)
    if behind > STALE_S:
        said = f"the newest block, {int(head['number'], 16)}, is {behind:.0f} s old"
        return warn("clock", said, "fine on a devnet that mines on demand; else check the clock and the chain's node")
    return ok("clock", f"block {int(head['number'], 16)} is {max(0, behind):.0f} s old")


def balances(url: str, deployment: Deployment, config: NodeConfig) -> Iterator[Finding]:
    """The wallet's TALLY, and coin for gas. Raises: RpcFailed."""
    try:
        me = addresses(config.keys_dir).get("wallet")
    except TallyError:
        me = None
    if me is None:
        return
    coin = int(_rpc(url, "eth_getBalance", f"0x{me.hex()}", "latest"), 16)
    data = _BALANCE_OF + me.rjust(32, b"\0").hex()
    held = int(_rpc(url, "eth_call", {"to": f"0x{deployment.token.hex()}", "data": data}, "latest"), 16)
    yield _balance("TALLY", me, held, f"{money.tally(held)} TALLY", "buy needs TALLY for escrow, sell for stake")
    yield _balance("gas", me, coin, f"{money.tally(coin)} of the chain's coin", "every transaction costs gas")


def _balance(name: str, me: Address, wei: int, shown: str, why: str) -> Finding:
    if wei == 0:
        return warn(name, f"the wallet has none ({why})", f"send some to 0x{me.hex()}")
    return ok(name, shown)


class RpcFailed(Exception):
    """The endpoint gave no answer, or an error."""


def _rpc(url: str, method: str, *params: Any) -> Any:
    """One JSON-RPC call, by the standard library: the doctor must not depend on what it examines. Raises: RpcFailed."""
    from urllib.error import URLError
    from urllib.request import Request, urlopen

    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    request = Request(url, body, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=RPC_TIMEOUT_S) as response:
            answer = json.loads(response.read(4 << 20))
    except URLError as exc:
        raise RpcFailed(str(exc.reason)) from exc
    except (OSError, ValueError) as exc:
        raise RpcFailed(str(exc)) from exc
    if not isinstance(answer, dict) or answer.get("error") is not None or "result" not in answer:
        raise RpcFailed(f"{method}: {answer.get('error') if isinstance(answer, dict) else answer}")
    return answer["result"]
