"""`tally market`: who offers what, at which price, and what the same job costs everywhere."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli import money
from node.cli.failures import CommandFailed
from node.cli.lazy import LazyGroup
from node.cli.session import Session, emit, json_option, pass_session
from node.cli.tables import short, table

if TYPE_CHECKING:
    from node.cli.market_rows import Row, Wanted
    from node.config import NodeConfig

WATCH_S: Final = 5.0
"""Pause of --watch. Unit: s. Offers change at most every few seconds."""

MAX_PROMPT_BYTES: Final = 160_000
"""Largest --prompt file. Unit: bytes of UTF-8, which six-fold JSON escapes still bring under the control socket's
megabyte. About 40,000 tokens of English."""

ANSWER_S: Final = 60.0
"""How long a running gateway gets to answer, tokenizers fetched and all. Unit: s."""

_SORTS: Final = ("ste", "tokens", "text", "ttft", "job")


class JobSize(click.ParamType[tuple[int, int, int]]):
    """`PROMPT:OUTPUT` or `PROMPT:OUTPUT:CACHED`, in tokens."""

    name = "prompt:output[:cached]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        """Raises: BadParameter."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([0-9]{1,7}):([0-9]{1,7})(?::([0-9]{1,7}))?", str(value))
        if match is None:
            self.fail(f"{value!r} is not PROMPT:OUTPUT or PROMPT:OUTPUT:CACHED, such as 3000:500:2048", param, ctx)
        prompt, output, cached = int(match[1]), int(match[2]), int(match[3] or 0)
        if cached > prompt:
            self.fail(f"{cached} cached tokens are more than the prompt's {prompt}", param, ctx)
        return prompt, output, cached


@click.group(
    cls=LazyGroup,
    lazy={"import": ("node.cli.market_import:import_", "Read an outside platform's price sheet.")},
    invoke_without_command=True,
)
@click.option("--model", help="Only this model.")
@click.option(
    "--tier",
    type=click.Choice(["flex", "standard", "priority"]),
    default="standard",
    show_default=True,
    help="Latency tier that prices and promises are for.",
)
@click.option(
    "--sort", type=click.Choice(_SORTS), help="Order by this figure. [default: job if one is priced, else ste]"
)
@click.option(
    "--job", type=JobSize(), metavar="PROMPT:OUTPUT[:CACHED]", help="Price a job of so many tokens everywhere."
)
@click.option(
    "--prompt", type=click.Path(dir_okay=False, path_type=Path), help="Price this text, counted by each tokenizer."
)
@click.option(
    "--max-tokens", type=click.IntRange(0, 1 << 20), default=512, show_default=True, help="Output of --prompt."
)
@click.option("--bootstrap", multiple=True, metavar="ADDR", help="/ip4/.../p2p/... of a peer to ask first; repeatable.")
@click.option("--watch", is_flag=True, help=f"Ask again every {WATCH_S:g} seconds until Ctrl-C.")
@json_option
@pass_session
@click.pass_context
def market(
    ctx: click.Context,
    session: Session,
    model: str | None,
    tier: str,
    sort: str | None,
    job: tuple[int, int, int] | None,
    prompt: Path | None,
    max_tokens: int,
    bootstrap: tuple[str, ...],
    watch: bool,
    as_json: bool,
) -> None:
    """Live offers, verified against the chain, compared over a fixed basket. Amounts: TALLY.

    PROMPT, CACHED, OUTPUT, REASON: per million tokens at this tier and base multiplier. /STE: per standard token
    equivalent (16e9 operations). MIX: per million tokens, three read to one written. /MB: per megabyte of reference
    text in that mix, by the offer's own tokenizer. JOB: the job of --job or --prompt. `-`: the tier is not offered or
    the job does not fit; `?`: not known; `~`: counted with another offer's tokenizer. Sheets of outside platforms stand
    in the same table, in their own currency unless a rate is configured. Compared figures are rounded up to six digits;
    --json has them whole.

    Uses the gateway that runs in this home, else asks the bootstrap peers itself.

    \b
    tally market --sort text
    tally market --job 3000:500:2048 --tier priority
    tally market --prompt question.txt --max-tokens 800 --json
    """
    if ctx.invoked_subcommand is not None:
        return
    if job is not None and prompt is not None:
        raise click.UsageError("--job and --prompt both say which job to price; give one")
    if sort == "job" and job is None and prompt is None:
        raise click.UsageError("--sort job needs a job to price: --job or --prompt")
    from node.cli.market_rows import Wanted
    from node.cli.running import run
    from protocol.units import Tier

    text = None if prompt is None else _text(prompt)
    if job is not None:
        wanted = Wanted(Tier[tier.upper()], job[0], job[2], job[1])
    else:
        wanted = Wanted(Tier[tier.upper()], output=None if text is None else max_tokens)
    config = session.load(transport__bootstrap=bootstrap or None)
    session.log(config, serving=False)
    shown = _Shown(
        model,
        wanted,
        sort or ("job" if wanted.output is not None else "ste"),
        watch,
        as_json,
        _outside(config, model, wanted),
    )
    params = {"model": model, "measure": True, "text": text}
    run(_show(session, config, {name: value for name, value in params.items() if value is not None}, shown))


def _text(path: Path) -> str:
    """Raises: CommandFailed."""
    try:
        raw = path.read_bytes()
        if len(raw) > MAX_PROMPT_BYTES:
            raise CommandFailed(f"{path} has {len(raw)} bytes, at most {MAX_PROMPT_BYTES} are counted", do="use --job")
        return raw.decode("utf-8")
    except OSError as exc:
        raise CommandFailed(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise CommandFailed(f"{path} is not UTF-8 text") from exc


def _outside(config: NodeConfig, model: str | None, wanted: Wanted) -> list[Row]:
    """Rows of the imported sheets; of one model, by its name here or there, when one is asked for."""
    from node.cli.market_rows import outside_row
    from node.upstream.sheets import load_sheets

    names = (None, model, dict(config.exchange.models).get(model or ""))
    return [
        outside_row(sheet, found, config.exchange.tally_usd, wanted)
        for sheet in load_sheets(config.home)
        for found in sheet.models
        if model is None or found.id in names
    ]


async def _show(session: Session, config: NodeConfig, params: dict[str, Any], shown: _Shown) -> None:
    from node.gateway.control import ControlUnavailable

    control = session.control()
    try:
        while True:
            shown.print((await control.call("market", timeout_s=ANSWER_S, **params))["offers"])
            if not shown.watch:
                return
            await asyncio.sleep(WATCH_S)
    except ControlUnavailable:
        pass
    from node.app import client_app
    from node.routes import market_routes

    async with client_app(config) as app:
        route = market_routes(app.marketplace, app.chain, app.marketplace.card_of)["market"]
        while True:
            await app.directory.refresh()
            shown.print((await route(params))["offers"])
            if not shown.watch:
                return
            await asyncio.sleep(WATCH_S)


class _Shown:
    """How the answer is shown."""

    def __init__(
        self, model: str | None, wanted: Wanted, sort: str, watch: bool, as_json: bool, outside: list[Row]
    ) -> None:
        self._model, self._wanted, self._sort, self._outside = model, wanted, sort, outside
        self.watch, self._as_json = watch, as_json

    def print(self, offers: list[dict[str, Any]]) -> None:
        """Raises: CommandFailed."""
        from node.cli.market_rows import as_json, lend_counts, offer_row, sorted_by

        rows = [offer_row(offer, self._wanted) for offer in offers] + self._outside
        rows = sorted_by(lend_counts(rows), self._sort)
        if self._as_json:
            emit([as_json(row) for row in rows])
            return
        if self.watch:
            click.clear()
        if not rows:
            click.echo(f"no live offer of {self._model} is known" if self._model else "no live offer is known")
            return
        priced = self._wanted.output is not None
        head = [name for name in _HEAD if priced or name != ">JOB"]
        click.echo(table(head, [_cells(row, priced) for row in rows]))


_HEAD: Final = (
    "MODEL",
    "SELLER",
    ">PROMPT",
    ">CACHED",
    ">OUTPUT",
    ">REASON",
    ">/STE",
    ">MIX",
    ">/MB",
    ">JOB",
    "UNIT",
    ">BASE",
    ">TTFT",
    "VERIFY",
    ">LOAD",
    ">SLOTS",
    ">CONTEXT",
    ">STAKE",
    "REGION",
)


def _cells(row: Row, priced: bool) -> tuple[str, ...]:
    from incentives.basket import million_up
    from node.cli.market_rows import factor

    prices, facts = row.prices, row.facts

    def each(name: str) -> str:
        return "-" if prices is None else money.tally(million_up(getattr(prices, name), prices.multiplier))

    def figure(amount: int | None, *, counted: bool = False) -> str:
        if amount is None:
            return "-" if prices is None else "?"
        return ("~" if counted and row.estimated else "") + money.rounded_up(amount)

    job = "-" if row.too_long else figure(row.job, counted=True)
    return (
        row.model,
        short(row.seller) if row.seller.startswith("0x") else row.seller,
        each("prompt"),
        each("cached"),
        each("output"),
        each("reasoning"),
        figure(row.per_ste),
        figure(row.per_million),
        figure(row.per_megabyte, counted=True),
        *((job,) if priced else ()),
        row.unit,
        "-" if row.base_bps is None else factor(row.base_bps),
        "?" if row.ttft_ms is None else f"{row.ttft_ms} ms" if row.ttft_ms else "-",
        row.verifiability,
        f"{facts['load_bps'] // 100}%" if "load_bps" in facts else "?",
        str(facts.get("slots", "?")),
        str(facts.get("max_context") or "?"),
        "?" if facts.get("stake_wei") is None else money.tally(int(facts["stake_wei"])),
        facts.get("region") or "-",
    )
