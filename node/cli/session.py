"""What all commands share: the global options, the settings they select, and how results are printed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from node.config import NodeConfig
    from node.gateway.control import ControlClient

CONTROL_SOCKET: Final = "control.sock"
"""The control socket's name in a home, as node/app.py makes it."""

API_KEYS: Final = "api_keys.json"
"""The gateway's keys in a home, as node/app.py opens them."""


@dataclass(frozen=True, slots=True)
class Session:
    """The global options as given; None where an option was not given."""

    home: Path | None = None
    config: Path | None = None
    log_level: str | None = None
    password_file: Path | None = None

    def load(self, **flags: Any) -> NodeConfig:
        """The settings, with `flags` (dots of a key written as double underscores) above file and environment.

        Raises: ConfigError.
        """
        from node import config

        named = {key.replace("__", "."): value for key, value in flags.items()}
        given = {"home": self.home, "log.level": self.log_level, "password_file": self.password_file, **named}
        return config.load(given, file=self.config)

    def home_path(self) -> Path:
        """The home that the options, the environment or the default select; it need not exist."""
        import os

        from node.config import default_home

        return (self.home or default_home(os.environ)).expanduser().absolute()

    def control(self) -> ControlClient:
        """A client of the node that runs in this home, if one does."""
        from node.gateway.control import ControlClient

        return ControlClient(self.home_path() / CONTROL_SOCKET)

    def log(self, config: NodeConfig, *, serving: bool) -> None:
        """Send logs to stderr; a short command stays silent below WARNING unless a level was asked for."""
        from node import log

        quiet = not serving and config.origins.get("log.level") == "default"
        as_json = {"json": True, "text": False}.get(config.log.format)
        log.setup("WARNING" if quiet else config.log.level, json=as_json)


pass_session = click.make_pass_decorator(Session, ensure=True)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON; amounts are wei, as decimal strings.")


def emit(value: object) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def hexed(value: bytes) -> str:
    """0x and lower-case hexadecimal."""
    return "0x" + value.hex()


def write_private(path: Path, text: str) -> None:
    """Replace a file as a whole by one of mode 0600. Raises: CommandFailed."""
    import os
    import secrets

    from node.cli.failures import CommandFailed

    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        part.replace(path)
    except OSError as exc:
        part.unlink(missing_ok=True)
        raise CommandFailed(
            f"{path} cannot be written: {exc.strerror}",
            kept="the old file, if any, is unchanged",
            do="choose another place",
        ) from exc
