"""`tally provider run`: serve a model until told to stop."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.cli import money
from node.cli.failures import Interrupted
from node.cli.lazy import LazyGroup
from node.cli.params import HostPort
from node.cli.session import Session, emit, hexed, json_option, pass_session, write_private

if TYPE_CHECKING:
    from node.app import ProviderApp
    from node.cli.running import Stop
    from node.config import NodeConfig


@click.group(
    cls=LazyGroup,
    lazy={"economics": ("node.cli.economics:economics", "What serving brought and cost, for your eyes only.")},
)
def provider() -> None:
    """Sell inference: serve a model and be paid by the token.

    Every 32 tokens the client owes a signed voucher before it gets more, so at most one such increment is ever at
    risk. Vouchers are settled on chain by themselves.
    """


@provider.command()
@click.option("--model", type=click.Path(path_type=Path), metavar="DIR", help="Hugging Face model directory to serve.")
@click.option("--upstream", metavar="URL", help="Serve through this OpenAI-compatible server; DIR gives the tokenizer.")
@click.option("--upstream-model", metavar="NAME", help="The model as that server names it.")
@click.option("--upstream-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Its API key, first line.")
@click.option("--allow-private", is_flag=True, default=None, help="The upstream server may be in a private network.")
@click.option("--slots", type=int, help="Generations served at the same time.")
@click.option("--listen", type=HostPort(), metavar="HOST:PORT", help="Where peers reach this node; port 0 takes any.")
@click.option("--bootstrap", multiple=True, metavar="ADDR", help="/ip4/.../p2p/... of a peer to ask first; repeatable.")
@click.option("--price-prompt", metavar="TALLY", help="Per million prompt tokens.")
@click.option("--price-cached", metavar="TALLY", help="Per million prompt tokens found in the prefix cache.")
@click.option("--price-completion", metavar="TALLY", help="Per million generated tokens (reasoning tokens too).")
@click.option("--tariff", "tariff_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Serve under this price sheet or signed tariff, instead of the settings' prices.")  # fmt: skip
@click.option("--stake", metavar="TALLY", help="Stake to hold in the Registry.")
@click.option("--region", metavar="TEXT", help="Where the machine stands, as told in the offer.")
@click.option("--ready-file", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON there when serving.")
@json_option
@pass_session
def run(
    session: Session,
    model: Path | None,
    upstream: str | None,
    upstream_model: str | None,
    upstream_key_file: Path | None,
    allow_private: bool | None,
    slots: int | None,
    listen: tuple[str, int] | None,
    bootstrap: tuple[str, ...],
    price_prompt: str | None,
    price_cached: str | None,
    price_completion: str | None,
    tariff_file: Path | None,
    stake: str | None,
    region: str | None,
    ready_file: Path | None,
    as_json: bool,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM.

    A signal stops it cleanly: no new jobs, running ones finish or are receipted, vouchers are settled. A second
    signal stops it at once; the journal keeps what was owed and the next start settles it.

    Prices are TALLY per million tokens, in the log on chain before they hold, and the same for every client.

    \b
    tally provider run --model ./Qwen3-0.6B
    tally provider run --model ./m --listen 0.0.0.0:4001 --price-prompt 0.05 --price-completion 0.20
    tally provider run --model ./m --bootstrap /ip4/203.0.113.7/tcp/4001/p2p/16Uiu2HAm...
    tally provider run --model ./m --tariff prices.json
    tally provider run --model ./m --upstream http://127.0.0.1:8000/v1

    With --upstream another server computes (vLLM, SGLang, llama.cpp), --model DIR needs no weights, and the offer
    states what can be checked of it: each token's log-probability where the server names its tokens, else nothing.
    """
    host, port = listen or (None, None)
    config = session.load(
        provider__model_dir=model,
        provider__upstream=upstream,
        provider__upstream_model=upstream_model,
        provider__upstream_key_file=upstream_key_file,
        provider__upstream_private=allow_private,
        provider__slots=slots,
        transport__listen_host=host,
        transport__listen_port=port,
        transport__bootstrap=bootstrap or None,
        provider__prompt_price=price_prompt,
        provider__cached_price=price_cached,
        provider__completion_price=price_completion,
        provider__reasoning_price=price_completion,
        provider__tariff_file=tariff_file,
        provider__stake=stake,
        provider__region=region,
    )
    session.log(config, serving=True)
    from node.cli.running import Stop
    from node.cli.running import run as run_to_end

    stop = Stop("stopping: no new jobs; finishing running ones and settling what is owed")
    run_to_end(_serve(config, stop, ready_file, as_json), stop)
    if stop.interrupted:
        raise Interrupted(stop.code)


async def _serve(config: NodeConfig, stop: Stop, ready_file: Path | None, as_json: bool) -> None:
    from node.app import provider_app

    async with provider_app(config) as app:
        facts = await ready_facts(app)
        if ready_file is not None:
            write_private(ready_file, json.dumps(facts) + "\n")
        if as_json:
            emit(facts)
        else:
            click.echo("\n".join(_banner(facts, config)))
        await stop.wait()


async def ready_facts(app: ProviderApp) -> dict[str, Any]:
    """What others need to know of a serving provider. `addresses` end in /p2p/, as --bootstrap takes them."""
    peer_id = app.transport.peer_id
    return {
        "role": "provider",
        "peer_id": peer_id,
        "addresses": [f"{address}/p2p/{peer_id}" for address in app.transport.addresses],
        "wallet": hexed(app.wallet.address),
        "node_key": hexed(app.node_key.address),
        "model": (await app.provider.status())["model"],
        "pid": os.getpid(),
    }


def _banner(facts: dict[str, Any], config: NodeConfig) -> list[str]:
    prices = config.provider
    lines = [
        f"serving    {facts['model']} in {prices.slots} slots",
        *([f"upstream   {prices.upstream}"] if prices.upstream else []),
        f"peer       {facts['peer_id']}",
        *(f"reach it   --bootstrap {address}" for address in facts["addresses"]),
        f"wallet     {facts['wallet']}",
        f"node key   {facts['node_key']}",
        f"stake      {money.amount(prices.stake)}",
    ]
    if prices.tariff_file is not None:
        lines.append(f"tariff     {prices.tariff_file}; `tally tariff show` says what it comes to")
    else:
        lines.append(
            "tariff     TALLY per million tokens: "
            f"prompt {money.per_million(prices.prompt_price)}, cached {money.per_million(prices.cached_price)}, "
            f"completion {money.per_million(prices.completion_price)}, "
            f"reasoning {money.per_million(prices.reasoning_price)}"
        )
        if prices.per_request:
            lines.append(f"           and {money.amount(prices.per_request)} a request")
    return [*lines, "Ctrl-C stops cleanly; `tally status` shows what runs here"]
