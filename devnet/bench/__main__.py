"""`python -m devnet.bench` (`make bench`): every benchmark, as a table and as JSON.

Nothing here passes or fails: an aim that is missed is shown as missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from devnet.bench import facts
from devnet.bench.gas import settlement_gas
from devnet.bench.models import SHAPES, random_model
from devnet.bench.report import keep, show
from devnet.bench.serving import both_sides, first_token, throughput
from devnet.bench.signatures import signatures
from devnet.bench.workload import Workload
from devnet.cluster import MODEL_DIR, MODEL_NAME
from protocol.errors import TallyError

PARTS: Final = ("throughput", "first_token", "signatures", "gas")

QUICK: Final[dict[str, Any]] = {
    "streams": (1, 2),
    "max_tokens": 40,
    "rounds": 1,
    "repeats": 2,
    "ttft_samples": 3,
    "documents": 5,
    "gas_counts": (1, 2),
}
"""Shows that everything runs. Its figures mean nothing."""


def measure(work: Workload, parts: tuple[str, ...], say: Callable[[str], None]) -> dict[str, Any]:
    """Run `parts`. Raises: TallyError when something could not be started."""
    started = time.perf_counter()
    result: dict[str, Any] = {"taken_at": datetime.now(UTC).isoformat(timespec="seconds"), "model": work.model}
    with tempfile.TemporaryDirectory(prefix="tally-bench-") as scratch:
        result["machine"] = facts.machine(Path(scratch))
        result["load"] = {"start": facts.load()}
        result["workload"] = {
            "streams": work.streams,
            "max_tokens": work.max_tokens,
            "rounds": work.rounds,
            "repeats": work.repeats,
        }
        result |= asyncio.run(_measure(work, parts, Path(scratch), say))
    result["load"]["end"] = facts.load()
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


async def _measure(work: Workload, parts: tuple[str, ...], scratch: Path, say: Callable[[str], None]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if "signatures" in parts:
        say("signatures")
        result["signatures"] = signatures(work.documents)
    if "gas" in parts:
        result["gas"] = await settlement_gas(work.gas_counts, say)
    if {"throughput", "first_token"} & {*parts}:
        say("starting a market and a bare engine")
        if work.model in SHAPES:
            work = replace(work, model_dir=random_model(work.model, scratch / work.model))
        async with both_sides(work, scratch / "market") as sides:
            if "first_token" in parts:
                result["first_token"] = await first_token(sides, say)
            if "throughput" in parts:
                result["throughput"] = await throughput(sides, say)
    return result


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda line: progress.update(task, description=line)


@click.command()
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures nothing.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Where the JSON goes.")
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="These parts only; may be given more than once.")
@click.option(
    "--model",
    default=MODEL_NAME,
    show_default=True,
    help=f"A model directory, or {' or '.join(SHAPES)} for random weights of that size.",
)
@click.option("--repeats", type=click.IntRange(1), help="Samples of each side for each number of streams.")
@click.option("--rounds", type=click.IntRange(1), help="Requests per stream in a sample; fewer for large models.")
def main(
    quick: bool, path: Path | None, only: tuple[str, ...], model: str, repeats: int | None, rounds: int | None
) -> None:
    """Measure tokens/s and time to the first token against the bare engine, signatures, and settlement gas."""
    folder = Path(model)
    work = Workload(MODEL_DIR if model in (MODEL_NAME, *SHAPES) else folder.absolute(), folder.name)
    work = replace(work, **QUICK) if quick else work
    work = replace(work, repeats=repeats or work.repeats, rounds=rounds or work.rounds)
    try:
        with _progress() as say:
            result = measure(work, only or PARTS, say)
    except TallyError as exc:
        raise click.ClickException(str(exc)) from exc
    show(result, Console())
    keep(result, path, "")


if __name__ == "__main__":
    main()
