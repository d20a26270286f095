"""`tally market import`: an outside platform's price sheet into this node's home."""

from __future__ import annotations

import time

import click

from node.cli.session import Session, emit, json_option, pass_session


@click.command("import")
@click.argument("source", metavar="FILE_OR_URL")
@click.option("--allow-private", is_flag=True, help="The URL may lead into a private network.")
@json_option
@pass_session
def import_(session: Session, source: str, allow_private: bool, as_json: bool) -> None:
    """Read an outside platform's prices (OpenRouter's JSON) and show them in `tally market` from now on.

    A later import from the same source replaces it. Prices are in USD; set exchange.tally_usd, what one TALLY is worth
    in USD, and they are compared with the market's own. Without that they are shown, and compared with nothing.

    \b
    tally market import https://openrouter.ai/api/v1/models
    tally market import ./prices.json
    """
    config = session.load()
    session.log(config, serving=False)
    from node.cli.running import run
    from node.upstream.sheets import FOLDER, LICENCE_NOTE, import_sheet

    sheet = run(import_sheet(source, config.home, int(time.time()), allow_private=allow_private))
    if as_json:
        skipped = [{"model": model, "reason": reason} for model, reason in sheet.skipped]
        told = {"source": sheet.source, "imported_at": sheet.read_at, "licence": LICENCE_NOTE}
        emit({**told, "models": [model.id for model in sheet.models], "skipped": skipped})
        return
    rate = config.exchange.tally_usd
    click.echo(f"imported  {len(sheet.models)} models from {sheet.source}")
    if sheet.skipped:
        name, reason = sheet.skipped[0]
        click.echo(f"skipped   {len(sheet.skipped)} without a fixed price, such as {name}: {reason}")
    click.echo(f"kept in   {config.home / FOLDER}; licence: {LICENCE_NOTE}")
    click.echo(
        f"compared  at {rate} USD for one TALLY (exchange.tally_usd)"
        if rate is not None
        else "shown     in USD only: exchange.tally_usd says what one TALLY is worth"
    )
