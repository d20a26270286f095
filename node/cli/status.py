"""`tally status`: what runs in this home, and what its journal last knew when nothing does."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from node.cli import money
from node.cli.session import Session, emit, json_option, pass_session


@click.command()
@json_option
@pass_session
def status(session: Session, as_json: bool) -> None:
    """What runs in this home: role, jobs, channels, money, chain.

    Without a running node it says so and shows what the journal knows.

    \b
    tally status
    tally --home ~/second-node status --json
    """
    from node.gateway.control import ControlUnavailable

    home = session.home_path()
    try:
        facts = session.control().call_now("status")
    except ControlUnavailable:
        facts = None
    if facts is not None:
        if as_json:
            emit({"running": True, "home": str(home), **facts})
        else:
            click.echo("\n".join([f"{'home':22} {home}", *_lines(facts)]))
        return
    config = session.load()
    known = _journal_facts(session) if config.journal.exists() else None
    if as_json:
        emit({"running": False, "home": str(home), "journal": known})
        return
    click.echo(f"no node runs in {home}")
    click.echo("the journal, as of its last use:" if known else "there is no journal: nothing was sold or bought here")
    if known:
        click.echo("\n".join(_lines(known)))


def _journal_facts(session: Session) -> dict[str, Any]:
    """Raises: StoreError."""
    from node.cli.running import run
    from node.routes import journal_facts

    config = session.load()
    session.log(config, serving=False)

    async def read() -> dict[str, Any]:
        from node.app import journal

        async with journal(config) as store:
            return await journal_facts(store)

    return run(read())


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Any JSON object as lines of `name value`; amounts in TALLY."""
    lines: list[str] = []
    for name, value in facts.items():
        label = f"{indent}{name.removesuffix('_wei').removesuffix('_ms').replace('_', ' '):{22 - len(indent)}}"
        if isinstance(value, dict):
            lines += [label.rstrip(), *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                lines += [f"{label.rstrip()}:", *_lines(item, indent + "  ")]
        else:
            lines.append(f"{label} {_shown(name, value)}")
    return lines


def _shown(name: str, value: Any) -> str:
    if value is None or value in ("", []):
        return "-"
    if name.endswith("_wei"):
        return money.amount(int(value))
    if name in ("at_ms", "timestamp"):
        return f"{datetime.fromtimestamp(value / (1000 if name == 'at_ms' else 1), UTC):%Y-%m-%d %H:%M:%S}Z"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
