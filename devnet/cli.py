"""`tally devnet up|demo|status|down`: a market on one's own machine, and the demo of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from devnet.cluster import Cluster
    from devnet.demo import DemoResult

T = TypeVar("T")

DEFAULT_HOME: Final = Path(".devnet")


@click.group()
def devnet() -> None:
    """A whole market on this machine: chain, contracts, providers, validators, a gateway. Test money, loopback only."""


_home = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_HOME,
    show_default=True,
    help="Directory for chain, keys and journals; made afresh at each start.",
)


@devnet.command()
@_home
@click.option("--providers", type=click.IntRange(1, 8), default=2, show_default=True)
@click.option("--validators", type=click.IntRange(0, 8), default=4, show_default=True, help="0, or 3 and more.")
@click.option("--port", type=click.IntRange(0, 65535), default=8411, show_default=True, help="Gateway; 0 takes any.")
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Model directory.")
def up(home: Path, providers: int, validators: int, port: int, model: Path | None) -> None:
    """Start everything and keep it running until Ctrl-C; prints URL, key and a curl line."""
    from devnet.cluster import MODEL_DIR, Cluster, ClusterOptions

    _refuse_second(home)
    served = (model or MODEL_DIR).absolute()
    options = ClusterOptions(home.absolute(), providers, validators, gateway_port=port, model_dir=served)
    click.echo("starting chain, contracts, providers, gateway and validators ...", err=True)

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        starting = asyncio.create_task(_enter(Cluster(options)))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return
        cluster = starting.result()
        try:
            _announce(cluster)
            await stop.wait()
            click.echo("stopping: jobs are ended, vouchers settled ...", err=True)
        finally:
            await cluster.__aexit__(None, None, None)

    asyncio.run(serve())
    click.echo("stopped; no process is left", err=True)


async def _enter(cluster: Cluster) -> Cluster:
    await cluster.__aenter__()
    try:
        await cluster.validators_ready()
    except BaseException:
        await cluster.__aexit__(None, None, None)
        raise
    return cluster


def _announce(cluster: Cluster) -> None:
    """Tell the person, and `status` and `down` by a file."""
    from devnet.cluster import MODEL_NAME

    facts = {
        "pid": os.getpid(),
        "url": cluster.url,
        "rpc_url": cluster.anvil.rpc_url,
        "processes": {node.name: node.pid for node in cluster.nodes},
    }
    (cluster.home / "devnet.json").write_text(json.dumps(facts, indent=1) + "\n")
    click.echo(f"URL  {cluster.url}\nKEY  {cluster.api_key}\nRPC  {cluster.anvil.rpc_url}\n")
    click.echo(
        f"curl {cluster.url}/chat/completions -H 'Authorization: Bearer {cluster.api_key}' \\\n"
        "  -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"model": "{MODEL_NAME}", "messages": [{{"role": "user", "content": "Define the word river."}}]}}\''
    )
    click.echo("\nCtrl-C ends it.", err=True)


def _facts(home: Path) -> dict[str, Any] | None:
    """What a running devnet of this home wrote, or None when there is none or it is dead."""
    try:
        facts: dict[str, Any] = json.loads((home / "devnet.json").read_text())
        os.kill(facts["pid"], 0)
    except (OSError, ValueError, KeyError):
        return None
    return facts


def _refuse_second(home: Path) -> None:
    facts = _facts(home)
    if facts is not None:
        raise click.ClickException(
            f"a devnet already runs in {home} (process {facts['pid']}); `tally devnet down --home {home}` ends it"
        )


@devnet.command()
@_home
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(home: Path, as_json: bool) -> None:
    """Say whether a devnet runs, where, and what its nodes say."""
    facts = _facts(home)
    if facts is None:
        click.echo(
            json.dumps({"running": False}) if as_json else f"no devnet runs in {home}; `tally devnet up` starts one"
        )
        sys.exit(1)
    alive = {name: _alive(pid) for name, pid in facts["processes"].items()}
    if as_json:
        click.echo(json.dumps({"running": True, **facts, "alive": alive}))
        return
    click.echo(f"devnet of process {facts['pid']} at {facts['url']}, chain at {facts['rpc_url']}")
    for name, is_alive in alive.items():
        click.echo(f"  {name:12} process {facts['processes'][name]}: {'runs' if is_alive else 'is gone'}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


@devnet.command()
@_home
def down(home: Path) -> None:
    """End the devnet that runs in another terminal, in order: it settles first."""
    from devnet.processes import STOP_SECONDS, wait_gone

    facts = _facts(home)
    if facts is None:
        click.echo(f"no devnet runs in {home}")
        return
    os.kill(facts["pid"], signal.SIGTERM)
    if not wait_gone(facts["pid"], 3 * STOP_SECONDS):
        raise click.ClickException(
            f"process {facts['pid']} did not end; `kill -9 {facts['pid']}` ends it and all nodes"
        )
    click.echo("stopped")


@devnet.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
@click.option("--home", type=click.Path(path_type=Path, file_okay=False), help="Keep chain, journals and logs there.")
def demo(as_json: bool, home: Path | None) -> None:
    """Run 28 jobs, kill a provider in the middle of one, catch a cheat and a liar, settle, and check every wei."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="tally-demo-") as scratch:
        result = _run_demo((home or Path(scratch) / "market").absolute(), as_json)
    if as_json:
        click.echo(json.dumps(_as_json(result)))
    else:
        _print_result(result)
    if not result.good:
        sys.exit(1)


def _as_json(result: DemoResult) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(result)


def _run_demo(home: Path, as_json: bool) -> DemoResult:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from devnet.demo import JOBS, Demo

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as progress:
        task = progress.add_task("jobs", total=JOBS)
        demo = Demo(
            home,
            lambda line: progress.console.print(f"[bold]>[/bold] {line}") if not as_json else None,
            lambda done: progress.update(task, completed=done),
        )
        finished = asyncio.run(_interruptible(demo.run()))
    if finished is None:  # said when the bar is gone, on a line of its own
        click.echo("interrupted; every process was stopped", err=True)
        sys.exit(130)
    return finished


async def _interruptible(work: Coroutine[Any, Any, T]) -> T | None:
    """Ctrl-C and SIGTERM cancel the work, whose contexts then stop every process; None then."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        return None


def _print_result(result: DemoResult) -> None:
    from rich.console import Console
    from rich.table import Table

    from node.cli.money import tally

    console = Console(soft_wrap=True)
    table = Table(title="Who served, earned and paid")
    for column in ("party", "role", "tokens", "earned TALLY", "paid TALLY", "gas"):
        table.add_column(column, justify="left" if column in ("party", "role") else "right")
    for party in result.parties:
        table.add_row(
            party["name"],
            party["role"],
            f"{party['tokens']:,}",
            tally(party["earned"]) if party["earned"] else "",
            tally(party["paid"]) if party["paid"] else "",
            f"{party['gas']:,}" if party["gas"] else "",
        )
    table.add_row("protocol", "fee, burned", "", tally(result.protocol_fee_wei), "", "")
    console.print(table)
    console.print(
        f"{result.jobs_ok} jobs ended well, {result.jobs_cancelled} hung up, {result.jobs_failed} failed;"
        f" {result.prompt_tokens:,} prompt and {result.completion_tokens:,} output tokens"
    )
    console.print(
        f"{result.receipts_signed} receipts signed, {result.receipts_acknowledged} acknowledged;"
        f" {tally(result.settled_wei)} TALLY settled at {result.gas_per_pair:,} gas a pair"
    )
    _print_cases(console, result)
    _print_exhibits(console, result)
    _print_stakes(console, result)
    console.print(
        f"all audits together computed {result.audit_cost_ratio:.2f} of what the jobs did; 3 or 4 looked at each"
    )
    _verdict(console, "every wei accounted for, earnings, fees and stakes", result.conservation_ok)
    _verdict(console, "the text of the killed stream equals the undisturbed one", result.failover_text_identical)
    caught = result.cheaters_slashed == result.cheaters
    _verdict(console, f"{result.cheaters_slashed} of {result.cheaters} cheaters lost stake on chain", caught)
    _verdict(console, f"{result.honest_slashed} honest parties lost any", result.honest_slashed == 0)
    for problem in result.problems:
        console.print(f"  [red]{problem}[/red]")
    console.print(f"{result.seconds:.1f} s")


def _verdict(console: Any, what: str, good: bool) -> None:
    console.print(f"[{'green' if good else 'red'}]{'yes' if good else 'NO '}[/] {what}")


def _print_cases(console: Any, result: DemoResult) -> None:
    from rich.table import Table

    table = Table(title="What the Court decided")
    for column in ("case", "provider", "jobs", "flagged", "rounds", "agreed", "verdict"):
        table.add_column(column, justify="left" if column in ("case", "provider", "verdict") else "right")
    for case in result.cases:
        last = max((vote["round"] for vote in case["votes"]), default=0)
        decisive = Counter(vote["outcome"] for vote in case["votes"] if vote["round"] == last)
        table.add_row(
            case["case"][:10],
            case["provider"],
            str(case["jobs"]),
            f"{case['flags']} of {case['tokens']}",
            str(last + 1),
            f"{decisive[case['verdict']]} of {decisive.total()}",
            f"[{'red' if case['slashed_wei'] else 'green'}]{case['verdict']}[/]",
        )
    console.print(table)


def _print_exhibits(console: Any, result: DemoResult) -> None:
    """The flagged tokens, in the words around them."""
    from rich.table import Table
    from rich.text import Text

    if not result.exhibits:
        return
    table = Table(title="The cheat's worst tokens: what its model wrote, the one it sold would not have")
    for column in ("job", "position", "text"):
        table.add_column(column, justify="right" if column == "position" else "left")
    for column in ("margin", "logprob off", "hidden off"):
        table.add_column(column, justify="right")
    for item in result.exhibits:
        table.add_row(
            item["job"][:10],
            str(item["position"]),
            Text.assemble(_flat(item["before"]), (_flat(item["text"]), "bold red")),
            "none" if item["margin"] is None else f"{item['margin']:.2f}",
            f"{item['logprob']:.3f}",
            f"{item['projection']:.1%}",
        )
    console.print(table)


def _flat(text: str) -> str:
    """On one line, whatever the model wrote."""
    return text.replace("\n", "⏎")


def _print_stakes(console: Any, result: DemoResult) -> None:
    """Only who lost stake; of the others the last lines say that they did not."""
    from node.cli.money import amount

    for stake in result.stakes:
        if stake["slashed_wei"]:
            console.print(
                f"{stake['name']} lost {amount(stake['slashed_wei'])} of {amount(stake['deposited_wei'])} stake:"
                f" transaction {stake['transactions'][0]}"
            )
