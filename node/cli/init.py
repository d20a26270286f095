"""`tally init`: make a home, so that everything after it only needs a chain and peers."""

from __future__ import annotations

import base64
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.cli.failures import CommandFailed
from node.cli.session import Session, emit, hexed, json_option, pass_session, write_private

if TYPE_CHECKING:
    from node.config import Key


@click.command()
@json_option
@pass_session
def init(session: Session, as_json: bool) -> None:
    """Make the home: config.toml with every setting explained, a password file, and the keys.

    What exists is left as it is, so it is safe to run again. The keys: `wallet` holds funds, `node` is the peer
    identity that signs receipts, `session` signs payments.

    \b
    tally init
    tally --home ~/provider init
    """
    from node.app import password_of
    from node.keys import key_path, load_or_create

    home = session.home_path()
    made: list[str] = []
    _make_home(home, made)
    settings_file = home / "config.toml"
    if not settings_file.exists():
        write_private(settings_file, template(home))
        made.append(str(settings_file))
    config = session.load()
    password_file = config.password_file or home / "password"
    if not password_file.exists():
        write_private(password_file, base64.urlsafe_b64encode(secrets.token_bytes(24)).decode() + "\n")
        made.append(str(password_file))
    password = password_of(config)
    found: dict[str, str] = {}
    for name in ("wallet", "node", "session"):
        path = key_path(config.keys_dir, name)
        if not path.exists():
            made.append(str(path))
        found[name] = hexed(load_or_create(config.keys_dir, name, password).address)
    if as_json:
        emit({"home": str(home), "made": made, "keys": found})
    else:
        click.echo("\n".join(_report(home, made, found, config.chain.deployment)))


def _make_home(home: Path, made: list[str]) -> None:
    """Raises: CommandFailed."""
    try:
        if not home.is_dir():
            home.mkdir(mode=0o700, parents=True)
            made.append(str(home))
        elif home.stat().st_mode & 0o077 and home.stat().st_uid == os.getuid():
            home.chmod(0o700)
    except OSError as exc:
        raise CommandFailed(
            f"{home} cannot be made: {exc.strerror}", kept="nothing was changed", do="choose another --home"
        ) from exc


def _report(home: Path, made: list[str], found: dict[str, str], deployment: Path) -> list[str]:
    lines = [f"home     {home}", *(f"made     {path}" for path in made)]
    if not made:
        lines.append("         everything was there already; nothing was changed")
    lines += [f"{name:8} {address}" for name, address in found.items()]
    return [
        *lines,
        "",
        f"Copy {home / 'keys'} and the password file to a safe place: nobody can restore them.",
        f"next: put the network's deployment.json at {deployment}, send TALLY and coin for gas to the wallet,",
        "      set chain.rpc_url and transport.bootstrap in config.toml, then run `tally doctor`.",
    ]


def template(home: Path) -> str:
    """A settings file with every key at its default, commented out."""
    from node.config import KEYS

    lines = [
        "# Settings of one Tallystick node. A line without # overrides the default; TALLY_* variables and flags",
        "# override this file. `tally config show --origin` shows what is in force and why.",
        "# Amounts are TALLY, prices TALLY per million tokens, both as text: they are read exactly.",
    ]
    section = ""
    for key in KEYS:
        table, _, name = key.name.rpartition(".")
        if table != section:
            section = table
            lines += ["", f"[{table}]"]
        lines += ["", f"# {key.help} ({key.kind.form})", f"# {name} = {_toml(key, home)}"]
    return "\n".join(lines) + "\n"


def _toml(key: Key, home: Path) -> str:
    default: Any = key.default
    if default is None:
        return '""'
    if isinstance(default, tuple):
        return "[" + ", ".join(f'"{item}"' for item in default) + "]"
    if isinstance(default, int):
        return str(default).lower()  # true and false are written small
    return json.dumps(str(default).replace("${home}", str(home)), ensure_ascii=False)
