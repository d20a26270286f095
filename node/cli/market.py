"""`tally market`: who offers what, at which price."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli import money
from node.cli.session import Session, emit, json_option, pass_session
from node.cli.tables import short, table

if TYPE_CHECKING:
    from node.config import NodeConfig

WATCH_S: Final = 5.0
"""Pause of --watch. Unit: s. Offers change at most every few seconds."""


@click.command()
@click.option("--model", help="Only this model.")
@click.option("--bootstrap", multiple=True, metavar="ADDR", help="/ip4/.../p2p/... of a peer to ask first; repeatable.")
@click.option("--watch", is_flag=True, help=f"Ask again every {WATCH_S:g} seconds until Ctrl-C.")
@json_option
@pass_session
def market(session: Session, model: str | None, bootstrap: tuple[str, ...], watch: bool, as_json: bool) -> None:
    """Live offers, verified against the chain, cheapest completion first. Prices: TALLY per million tokens.

    Uses the gateway that runs in this home, else asks the bootstrap peers itself.

    \b
    tally market
    tally market --model Qwen3-0.6B --json
    """
    config = session.load(transport__bootstrap=bootstrap or None)
    session.log(config, serving=False)
    from node.cli.running import run

    run(_show(session, config, model, watch, as_json))


async def _show(session: Session, config: NodeConfig, model: str | None, watch: bool, as_json: bool) -> None:
    from node.gateway.control import ControlUnavailable

    control = session.control()
    try:
        while True:
            _print((await control.call("market", model=model))["offers"], watch, as_json)
            if not watch:
                return
            await asyncio.sleep(WATCH_S)
    except ControlUnavailable:
        pass
    from node.app import client_app
    from node.routes import market_routes

    async with client_app(config) as app:
        route = market_routes(app.marketplace, app.chain)["market"]
        while True:
            await app.directory.refresh()
            _print((await route({"model": model}))["offers"], watch, as_json)
            if not watch:
                return
            await asyncio.sleep(WATCH_S)


def _print(offers: list[dict[str, Any]], watch: bool, as_json: bool) -> None:
    if as_json:
        emit(offers)
        return
    if watch:
        click.clear()
    click.echo(table(_HEAD, [_row(offer) for offer in offers]) if offers else "no live offer is known")


_HEAD: Final = (
    "MODEL",
    "PROVIDER",
    ">PROMPT",
    ">CACHED",
    ">OUTPUT",
    ">REQUEST",
    ">SLOTS",
    ">LOAD",
    ">CONTEXT",
    ">STAKE",
    "REGION",
)


def _row(offer: dict[str, Any]) -> tuple[str, ...]:
    return (
        offer["model"],
        short(offer["provider"]),
        money.per_million(int(offer["prompt_wei"])),
        money.per_million(int(offer["cached_wei"])),
        money.per_million(int(offer["completion_wei"])),
        money.tally(int(offer["per_request_wei"])),
        str(offer["slots"]),
        f"{offer['load_bps'] // 100}%",
        str(offer["max_context"]),
        "?" if offer["stake_wei"] is None else money.tally(int(offer["stake_wei"])),
        offer["region"] or "-",
    )
