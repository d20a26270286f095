"""`tally config show`: every setting as it is in force, and where it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from node.cli import money
from node.cli.session import Session, emit, json_option, pass_session
from node.cli.tables import table

if TYPE_CHECKING:
    from node.config import Key, NodeConfig


@click.group()
def config() -> None:
    """Settings: defaults, then config.toml in the home, then TALLY_* variables, then flags; the later the stronger."""


@config.command()
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@json_option
@pass_session
def show(session: Session, origin: bool, as_json: bool) -> None:
    """All settings in force, in the form the settings file takes them.

    \b
    tally config show --origin
    TALLY_PROVIDER_SLOTS=4 tally config show --origin
    """
    from node.config import KEYS

    settings = session.load()
    values = {key.name: human(key, settings) for key in KEYS}
    if as_json:
        home = {"home": {"value": str(settings.home), "origin": settings.origins["home"]}}
        emit({**home, **{name: {"value": value, "origin": settings.origins[name]} for name, value in values.items()}})
        return
    rows = [("home", str(settings.home), settings.origins["home"])]
    rows += [(name, _text(value), settings.origins[name]) for name, value in values.items()]
    click.echo(
        table(("SETTING", "VALUE", "ORIGIN"), rows) if origin else table(("SETTING", "VALUE"), [r[:2] for r in rows])
    )


def human(key: Key, settings: NodeConfig) -> Any:
    """A setting's value as one would write it in the file; None for no value."""
    from node import config_values as kinds
    from protocol.units import BPS

    section, _, name = key.name.rpartition(".")
    value = getattr(getattr(settings, section) if section else settings, name)
    if value is None or isinstance(value, bool):
        return value
    if key.kind is kinds.price:
        return money.per_million(value)
    if key.kind is kinds.tally:
        return money.tally(value)
    if key.kind is kinds.factor:
        whole, rest = divmod(int(value), BPS)
        return f"{whole}.{rest:04d}".rstrip("0").rstrip(".")
    if key.kind is kinds.duration:
        return f"{value}s"
    if key.kind is kinds.names:
        return [f"{ours}={theirs}" for ours, theirs in value]
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return value if isinstance(value, int) else str(value)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(value) if isinstance(value, list) else str(value)
