"""`tally doctor`: look at everything a node stands on, and say how to mend what is wrong."""

from __future__ import annotations

from typing import Final

import click

from node.cli.failures import EXIT_FAILED
from node.cli.session import Session, emit, json_option

_COLOURS: Final = {"ok": "green", "warn": "yellow", "FAIL": "red"}


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check software, home, keys, settings, journal, ports, chain, contracts, clock and balances.

    Nothing is changed. Each line is ok, warn (works, but look at it) or FAIL (will not work), with the mend below it;
    exit 1 if anything fails.
    """
    from node.cli.probe import Finding, Level, fail, probes
    from node.config import ConfigError

    session: Session = ctx.obj
    found: list[Finding] = []

    def tell(finding: Finding) -> None:
        found.append(finding)
        if not as_json:
            level = click.style(f"{finding.level.value:4}", fg=_COLOURS[finding.level.value])
            click.echo(f"{level}  {finding.name:14} {finding.detail}")
            if finding.mend:
                click.echo(f"      {'':14} mend: {finding.mend}")

    try:
        config = session.load()
    except ConfigError as exc:
        tell(
            fail(
                "settings",
                str(exc),
                "correct it where it was written; `tally config show --origin` then lists all",
            )
        )
    else:
        for finding in probes(config, running=_running(session)):
            tell(finding)
    failed = sum(finding.level is Level.FAIL for finding in found)
    if as_json:
        listed = [{"check": f.name, "level": f.level.value, "detail": f.detail, "mend": f.mend} for f in found]
        emit({"ok": not failed, "checks": listed})
    else:
        click.echo(f"{failed} of {len(found)} checks failed" if failed else f"{len(found)} checks, none failed")
    if failed:
        ctx.exit(EXIT_FAILED)


def _running(session: Session) -> bool:
    from node.gateway.control import ControlRefused, ControlUnavailable

    try:
        session.control().call_now("status", 3.0)
    except ControlUnavailable:
        return False
    except ControlRefused:
        return True
    return True
