"""`tally`: the command line of a Tallystick node."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from errno import EPIPE
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from node.cli.failures import (
    EXIT_FAILED,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    Fault,
    Interrupted,
    keep_traceback,
    told,
    told_fault,
)
from node.cli.lazy import LazyGroup
from node.cli.session import Session
from protocol.errors import TallyError

COMMANDS: Final = {
    "init": ("node.cli.init:init", "Make a home: settings, password file, keys."),
    "provider": ("node.cli.provider:provider", "Sell inference: serve a model and be paid by the token."),
    "validator": ("node.cli.validator:validator", "Check inference: replay drawn jobs, judge, be credited."),
    "gateway": ("node.cli.gateway:gateway", "Buy inference: a local OpenAI-compatible server."),
    "run": ("node.cli.run:run", "Send one prompt and stream the answer."),
    "batch": ("node.cli.batch:batch", "Run a file of requests at the flex price; stops and continues."),
    "market": ("node.cli.market:market", "What is on offer, at which price."),
    "tariff": ("node.cli.tariff:tariff", "Price sheets: write, sign, show, put on chain."),
    "profile": ("node.cli.profile:profile", "Models as they are judged: calibrate, show, register."),
    "fairness": ("node.cli.fairness:fairness", "Audit charges, books and equal service."),
    "receipts": ("node.cli.receipts:receipts", "List, show, verify and export receipts."),
    "audit": ("node.cli.audit:audit", "Replay a receipted job with the model's own weights."),
    "case": ("node.cli.case:case", "What validators found, and what came of it."),
    "reservation": ("node.cli.reservation:reservation", "Capacity bought or sold ahead."),
    "wallet": ("node.cli.wallet:wallet", "Balance, escrow channels, transfers."),
    "status": ("node.cli.status:status", "What runs in this home."),
    "doctor": ("node.cli.doctor:doctor", "Check this node from the keys to the chain."),
    "config": ("node.cli.config:config", "Settings, and where each comes from."),
}
"""Name -> (where, one line): all that `tally --help` needs to know of a command."""

_EXPECTED: Final = (TallyError, Interrupted, Fault, click.ClickException, click.exceptions.Abort, click.exceptions.Exit)

_GLOBAL: Final = ("--home", "--config", "--log-level", "--password-file")


class TallyGroup(LazyGroup):
    """The outermost group: every failure below becomes one clear message and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises: Fault in place of what nobody expected, its traceback kept in the home."""
        try:
            return super().invoke(ctx)
        except Exception as exc:
            if isinstance(exc, _EXPECTED) or getattr(exc, "errno", None) == EPIPE:
                raise
            home = ctx.obj.home_path() if isinstance(ctx.obj, Session) else None
            raise Fault(exc, keep_traceback(exc, home)) from exc

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; exits the process unless `standalone_mode` is off, then returns the exit code."""
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            code = result if isinstance(result, int) else 0
        except _EXPECTED as exc:
            code = _report(exc)
        if standalone_mode:
            sys.exit(code)
        return code


def _report(exc: Exception) -> int:
    """Say what happened on stderr; returns the exit code."""
    if isinstance(exc, Interrupted):
        return exc.code
    if isinstance(exc, click.exceptions.Abort):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    if isinstance(exc, click.ClickException):
        exc.show()
        if isinstance(exc, click.NoSuchOption) and exc.option_name in _GLOBAL:
            click.echo(f"{exc.option_name} goes before the command: tally {exc.option_name} VALUE COMMAND", err=True)
        return exc.exit_code
    if isinstance(exc, Fault):
        click.echo(told_fault(exc), err=True)
        return EXIT_FAULT
    assert isinstance(exc, TallyError)
    click.echo(told(exc), err=True)
    return EXIT_FAILED


@click.group(
    cls=TallyGroup,
    lazy=COMMANDS,
    plugins=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with `tally init`; `tally COMMAND --help` teaches each command by example.",
)
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where keys, journal and settings lie. [default: $TALLY_HOME or ~/.local/share/tallystick]",
)
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Settings file. [default: $TALLY_CONFIG or config.toml in the home]",
)
@click.option(
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
    help="Least severity that is logged to stderr.",
)
@click.option(
    "--password-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File whose first line opens the key files. [default: password in the home]",
)
@click.version_option(package_name="tallystick", prog_name="tally")
@click.pass_context
def cli(
    ctx: click.Context, home: Path | None, config: Path | None, log_level: str | None, password_file: Path | None
) -> None:
    """Buy and sell AI inference by the token, every token covered by a receipt that both sides signed.

    \b
    Sell:   tally provider run --model ./my-model
    Buy:    tally gateway run            (then point any OpenAI SDK at it)
            tally run "Why is the sky blue?"
    Check:  tally receipts list; tally receipts verify 0x3fa9
    """
    ctx.obj = Session(home, config, log_level, password_file)


def main() -> NoReturn:
    """Entry point of the `tally` command."""
    cli(prog_name="tally")
    raise AssertionError("a command in standalone mode exits")
