"""`tally gateway`: the local OpenAI-compatible server, and the API keys it accepts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli.failures import CommandFailed, Interrupted
from node.cli.session import API_KEYS, Session, emit, hexed, json_option, pass_session, write_private

if TYPE_CHECKING:
    from node.app import GatewayApp
    from node.cli.running import Stop
    from node.config import NodeConfig
    from node.gateway.auth import ApiKeys

FIRST_KEY: Final = "default"
"""Name of the key that a gateway without any makes at its first start."""


def api_keys(home: Path) -> ApiKeys:
    """The keys of the gateway in `home`."""
    from node.gateway.auth import ApiKeys
    from node.system import SystemClock, SystemEntropy

    return ApiKeys(home / API_KEYS, clock=SystemClock(), entropy=SystemEntropy())


@click.group()
def gateway() -> None:
    """Buy inference: a local server that any OpenAI SDK can use.

    It finds providers, pays them by the token, checks every receipt, and fails over without a gap in the text.
    """


@gateway.command()
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="TCP port; 0 takes a free one.")
@click.option("--bootstrap", multiple=True, metavar="ADDR", help="/ip4/.../p2p/... of a peer to ask first; repeatable.")
@click.option("--max-price", metavar="TALLY", help="Most that one request may cost.")
@click.option("--ready-file", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON there when serving.")
@json_option
@pass_session
def run(
    session: Session,
    host: str | None,
    port: int | None,
    bootstrap: tuple[str, ...],
    max_price: str | None,
    ready_file: Path | None,
    as_json: bool,
) -> None:
    """Serve /v1/chat/completions, /v1/completions, /v1/embeddings and /v1/models until Ctrl-C or SIGTERM.

    The first start makes an API key and shows it once. Only its hash is kept; `tally gateway key create` makes more.

    \b
    tally gateway run
    tally gateway run --port 9000 --bootstrap /ip4/203.0.113.7/tcp/4001/p2p/16Uiu2HAm...
    """
    config = session.load(
        client__gateway_host=host,
        client__gateway_port=port,
        transport__bootstrap=bootstrap or None,
        client__max_price=max_price,
    )
    session.log(config, serving=True)
    from node.cli.running import Stop
    from node.cli.running import run as run_to_end

    stop = Stop("stopping: no new requests; running ones finish and are paid")
    run_to_end(_serve(config, stop, ready_file, as_json), stop)
    if stop.interrupted:
        raise Interrupted(stop.code)


async def _serve(config: NodeConfig, stop: Stop, ready_file: Path | None, as_json: bool) -> None:
    from node.app import gateway_app

    async with gateway_app(config) as app:
        keys = api_keys(config.home)
        fresh = None if keys.entries() else keys.create(FIRST_KEY)
        facts = _ready_facts(app, fresh)
        if ready_file is not None:
            write_private(ready_file, json.dumps(facts) + "\n")
        if as_json:
            emit(facts)
        else:
            click.echo("\n".join(_banner(facts, fresh)))
        await stop.wait()


def _ready_facts(app: GatewayApp, fresh: str | None) -> dict[str, Any]:
    """What a supervisor needs. `api_key` only when this start made it; the file is 0600."""
    facts = {
        "role": "gateway",
        "url": app.url,
        "wallet": hexed(app.client.wallet.address),
        "session_key": hexed(app.client.session.address),
        "peer_id": app.client.transport.peer_id,
        "pid": os.getpid(),
    }
    return facts if fresh is None else {**facts, "api_key": fresh}


def _banner(facts: dict[str, Any], fresh: str | None) -> list[str]:
    lines = [f"gateway    {facts['url']}", f"wallet     {facts['wallet']}"]
    if fresh is not None:
        lines.append(f"API key    {fresh}   (shown this once; `tally gateway key create` makes more)")
    said = f'-H "Authorization: Bearer {fresh or "$TALLY_API_KEY"}"'
    body = '{"model": "MODEL", "messages": [{"role": "user", "content": "Hello"}]}'
    return [
        *lines,
        f"try it     curl {facts['url']}/models {said}",
        f"           curl {facts['url']}/chat/completions {said} -H 'Content-Type: application/json' -d '{body}'",
        "Ctrl-C stops cleanly; `tally market` shows what is on offer",
    ]


# ----------------------------------------------------------------------------------------------------------------- keys


@gateway.group()
def key() -> None:
    """Keys that may spend through this home's gateway.

    A running gateway sees changes at once. Keys are needed even on localhost: without one any web page could spend.
    """


@key.command()
@click.argument("name")
@json_option
@pass_session
def create(session: Session, name: str, as_json: bool) -> None:
    """Make a key and show it, this once.

    \b
    tally gateway key create laptop
    """
    text = api_keys(session.load().home).create(name)
    if as_json:
        emit({"name": name, "api_key": text})
    else:
        click.echo(text)
        click.echo(f"This is key {name!r}. Only its hash is kept, so copy it now.", err=True)


@key.command("list")
@json_option
@pass_session
def list_(session: Session, as_json: bool) -> None:
    """Names of the keys, and when each was made."""
    from datetime import UTC, datetime

    entries = api_keys(session.load().home).entries()
    if as_json:
        emit([{"name": entry.name, "created": entry.created} for entry in entries])
        return
    for entry in entries:
        click.echo(f"{datetime.fromtimestamp(entry.created, UTC):%Y-%m-%d %H:%M}Z  {entry.name}")
    if not entries:
        click.echo("no API keys; `tally gateway key create NAME` makes one", err=True)


@key.command()
@click.argument("name")
@pass_session
def revoke(session: Session, name: str) -> None:
    """Forget a key; whoever holds it is refused from now on."""
    if not api_keys(session.load().home).revoke(name):
        raise CommandFailed(
            f"there is no API key named {name!r}", kept="no key was changed", do="`tally gateway key list` names them"
        )
    click.echo(f"key {name!r} is revoked")
