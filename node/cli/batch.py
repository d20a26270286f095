"""`tally batch`: a file of requests, bought at the flex price, that can be stopped and continued."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli import money
from node.cli.params import Amount
from node.cli.session import Session, emit, json_option, pass_session
from protocol.units import Wei

if TYPE_CHECKING:
    import aiohttp
    from rich.progress import Progress

    from node.cli.batchbook import Book
    from node.cli.batchfile import BatchFile
    from node.cli.batchrun import Batch, Reply, Send
    from node.cli.running import Stop
    from node.config import NodeConfig

CONCURRENCY: Final = 8
"""Lines that run at once unless told otherwise. A provider of 8 slots is busy with them, and the gateway takes 32."""

BAD_SHOWN: Final = 10
"""Invalid lines named on the terminal; the error file has all."""


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Answers. [default: FILE.out.jsonl]")
@click.option("--errors", type=click.Path(dir_okay=False, path_type=Path), help="Errors. [default: FILE.errors.jsonl]")
@click.option(
    "--concurrency", type=click.IntRange(1, 32), default=CONCURRENCY, show_default=True, help="Lines that run at once."
)
@click.option(
    "--max-cost", type=Amount(), metavar="TALLY", help="Most that the whole batch may cost, all runs together."
)
@click.option("--bootstrap", multiple=True, metavar="ADDR", help="/ip4/.../p2p/... of a peer to ask first; repeatable.")
@click.option("--dry-run", is_flag=True, help="Check all lines, say what they can cost at most, and send nothing.")
@json_option
@pass_session
def batch(
    session: Session,
    file: Path,
    output: Path | None,
    errors: Path | None,
    concurrency: int,
    max_cost: Wei | None,
    bootstrap: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Send every line of FILE, in OpenAI's batch format, and write answers in OpenAI's batch output format.

    Lines are batch jobs: the flex price, served where nothing more urgent runs. All are checked before the first is
    sent; those that are wrong go to the error file with their line numbers, the rest is run. Answers are on disk as
    they come. Run the same command again to go on after Ctrl-C, a crash or an empty wallet: finished lines are skipped.

    Ctrl-C takes no more lines and lets the running ones finish; a second one stops at once.

    \b
    tally batch questions.jsonl
    tally batch questions.jsonl --dry-run
    tally batch questions.jsonl --max-cost 2.5 --concurrency 16 --json
    """
    from node.cli.batchfile import read_batch
    from node.cli.running import Stop
    from node.cli.running import run as run_to_end

    config = session.load(
        transport__bootstrap=bootstrap or None, client__gateway_host="127.0.0.1", client__gateway_port=0
    )
    session.log(config, serving=False)
    found = read_batch(file)
    _tell_bad(found, as_json)
    if dry_run:
        priced = run_to_end(_priced(session, config, found, concurrency))
        _show(priced, as_json, _price_lines)
        if priced["invalid"] or priced["refused"]:
            raise click.exceptions.Exit(1)
        return
    out = output or file.with_name(f"{file.name.removesuffix('.jsonl')}.out.jsonl")
    err = errors or file.with_name(f"{file.name.removesuffix('.jsonl')}.errors.jsonl")
    if len({file.resolve(), out.resolve(), err.resolve()}) < 3:
        raise click.UsageError("input, output and errors must be three files")
    stop = Stop("stopping: no more lines are sent; running ones finish")
    work = _run(session, config, found, (out, err), concurrency, max_cost, stop, quiet=as_json)
    summary = run_to_end(work, stop)
    _show(summary, as_json, _summary_lines)
    if stop.interrupted:
        raise click.exceptions.Exit(stop.code)
    if summary["failed"] or summary["invalid"] or summary["left"]:
        raise click.exceptions.Exit(1)
    return


async def _priced(session: Session, config: NodeConfig, found: BatchFile, concurrency: int) -> dict[str, Any]:
    from node.cli.batchrun import prices

    async with _sender(session, config) as send:
        priced = await prices(found, found.lines, send, concurrency)
    counts = {"lines": len(found.lines), "invalid": len(found.bad), "unpriced": priced.unpriced}
    refused = [{"line": number, "message": message} for number, message in priced.refused]
    return {**counts, "refused": refused, "least_wei": str(priced.least), "most_wei": str(priced.most)}


async def _run(
    session: Session,
    config: NodeConfig,
    found: BatchFile,
    files: tuple[Path, Path],
    concurrency: int,
    max_cost: Wei | None,
    stop: Stop,
    *,
    quiet: bool,
) -> dict[str, Any]:
    from node.cli.batchbook import Book
    from node.cli.batchrun import Batch

    with Book(found, *files) as book:
        skipped = sum(line.custom_id in book.finished for line in found.lines)
        async with _sender(session, config) as send:
            bar = _bar(len(found.lines), quiet)
            runner = Batch(
                found,
                book,
                send,
                concurrency=concurrency,
                most=max_cost,
                on_change=lambda: _draw(bar, book),
            )
            _draw(bar, book)
            try:
                await _until_done(runner, stop)
            finally:
                if bar is not None:
                    bar.stop()
        return _summary(found, book, runner, skipped, stop)


async def _until_done(runner: Batch, stop: Stop) -> None:
    """Run, and take no more lines from the first signal on."""
    running = asyncio.ensure_future(runner.run())
    asked = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            runner.stop("")
        await running
    finally:
        for task in (running, asked):
            task.cancel()
        await asyncio.gather(running, asked, return_exceptions=True)


# ----------------------------------------------------------------------------------------------------------- gateway


@asynccontextmanager
async def _sender(session: Session, config: NodeConfig) -> AsyncIterator[Send]:
    """Asks the gateway of this home, or one that lives as long as the batch."""
    import aiohttp

    from node.cli.oneshot import endpoint, own_key

    async with endpoint(session.control(), config) as url:
        headers = {"Authorization": f"Bearer {own_key(config.home)}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as http:

            async def send(path: str, body: dict[str, Any], key: str) -> Reply:
                return await _post(http, url.removesuffix("/v1") + path, body, key)

            yield send


async def _post(http: aiohttp.ClientSession, url: str, body: dict[str, Any], key: str) -> Reply:
    import aiohttp
    import msgspec

    from node.cli.batchrun import Reply

    headers = {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})}
    try:
        async with http.post(url, data=msgspec.json.encode(body), headers=headers) as response:
            found = msgspec.json.decode(await response.read())
            after = response.headers.get("Retry-After", "")
            return Reply(
                response.status,
                found if isinstance(found, dict) else {},
                response.headers.get("x-request-id", ""),
                response.headers.get("x-should-retry") != "false",
                float(after) if after.isdecimal() else None,
            )
    except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError) as exc:
        said = f"the gateway broke off: {str(exc) or type(exc).__name__}"
        return Reply(0, {"error": {"code": "connection", "message": said}})


# ------------------------------------------------------------------------------------------------------------ showing


def _summary(found: BatchFile, book: Book, runner: Batch, skipped: int, stop: Stop) -> dict[str, Any]:
    """The whole batch, over all its runs; `skipped`: lines that an earlier run finished."""
    totals = book.totals
    return {
        "output": str(book.output),
        "errors": str(book.errors),
        "lines": len(found.lines),
        "invalid": len(found.bad),
        "skipped": skipped,
        "done": totals.done,
        "failed": totals.failed,
        "left": len(runner.waiting),
        "why_left": runner.why,
        "interrupted": stop.interrupted,
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "cost_wei": str(totals.cost),
        "refund_wei": str(totals.refund),
        "unsettled_lines": totals.unsettled,
        "unsettled_most_wei": str(totals.unsettled_most),
    }


def _show(value: dict[str, Any], as_json: bool, lines: Any) -> None:
    if as_json:
        emit(value)
    else:
        click.echo("\n".join(lines(value)))


def _summary_lines(found: dict[str, Any]) -> list[str]:
    skipped = f"; {found['skipped']} were finished before this run" if found["skipped"] else ""
    lines = [
        f"{found['done']} of {found['lines']} lines answered, {found['failed']} failed, "
        f"{found['left']} left, {found['invalid']} invalid{skipped}",
        f"{found['prompt_tokens']} + {found['completion_tokens']} tokens, {money.amount(int(found['cost_wei']))}"
        + (f", refunds {money.amount(int(found['refund_wei']))}" if found["refund_wei"] != "0" else ""),
    ]
    if found["done"]:
        lines.append(f"answers in {found['output']}")
    if Path(found["errors"]).exists():
        lines.append(f"errors in {found['errors']}")
    if found["unsettled_lines"]:
        killed = f"{found['unsettled_lines']} lines ran when an earlier run was killed"
        lines.append(f"{killed}; `tally receipts list` shows what that cost")
    if found["why_left"]:
        lines.append(f"stopped: {found['why_left']}")
    if found["left"]:
        lines.append("run the same command again to go on")
    return lines


def _price_lines(found: dict[str, Any]) -> list[str]:
    least, most = (money.amount(int(found[name])) for name in ("least_wei", "most_wei"))
    refused = found["refused"]
    lines = [
        *(f"line {line['line']}: {line['message']}" for line in refused[:BAD_SHOWN]),
        *([f"and {len(refused) - BAD_SHOWN} more that would be refused"] if len(refused) > BAD_SHOWN else []),
        f"{found['lines'] - len(refused)} valid lines, {found['invalid'] + len(refused)} invalid",
        f"at most {least} with the cheapest offers that can take each line, {most} with the dearest",
    ]
    if found["unpriced"]:
        lines.append(f"{found['unpriced']} lines fit no offer now, and are not in these sums")
    return [*lines, "nothing was sent"]


def _tell_bad(found: BatchFile, as_json: bool) -> None:
    if as_json:
        return
    for bad in found.bad[:BAD_SHOWN]:
        click.echo(f"line {bad.number}: {bad.message}", err=True)
    if len(found.bad) > BAD_SHOWN:
        click.echo(f"and {len(found.bad) - BAD_SHOWN} more invalid lines", err=True)


def _bar(total: int, quiet: bool) -> Progress | None:
    """A progress bar on stderr where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("", total=total)
    bar.start()
    return bar


def _draw(bar: Progress | None, book: Book) -> None:
    if bar is None:
        return
    failed = f"{book.totals.failed} failed  " if book.totals.failed else ""
    bar.update(bar.task_ids[0], completed=len(book.finished), description=f"{failed}{money.amount(book.totals.cost)}")
