"""`python -m devnet.bench.engine` (`make bench-engine`): our engine against those a provider could run instead.

Same weights, same prompts, same machine, one after the other within every repeat; each rival in a process of its own,
with the number of threads that serves it best. Nothing here passes or fails: an aim that is missed is shown as missed,
and a rival that is not there is shown as not there.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from devnet.bench import facts
from devnet.bench.engine_report import evaluate, show
from devnet.bench.models import SHAPES, random_model
from devnet.bench.report import keep
from devnet.bench.workload import summary

RIVALS: Final = ("tally", "llama.cpp", "continuous", "generate")

ANSWER_S: Final = 300
"""Longest a rival may take for one wave or to load. Unit: seconds. The slowest takes one on an idle machine; doubling
it doubles how long a rival that hangs holds up the rest."""

SHARED_PROMPT: Final = 1000
"""Prompt of the prefix-cache measurement. Unit: tokens. A system prompt with tools is about that long."""

BANDWIDTH_BYTES: Final = 256 << 20
"""What is read to measure memory. Unit: bytes. Several times any cache; doubling it changes no figure."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. `threads`: numbers of threads each rival is tried with."""

    models: tuple[str, ...] = ("15m", "100m")
    streams: tuple[int, ...] = (1, 16, 32)
    rivals: tuple[str, ...] = RIVALS
    threads: tuple[int, ...] = (1, 2)
    prompt: int = 128
    output: int = 128
    repeats: int = 5
    shared_prompt: int = SHARED_PROMPT
    device: str = "cpu"


QUICK: Final[dict[str, Any]] = {
    "models": ("15m",),
    "streams": (1, 2),
    "prompt": 16,
    "output": 8,
    "repeats": 2,
    "threads": (1,),
    "shared_prompt": 128,
}
"""Shows that everything runs. Its figures mean nothing."""


class Missing(Exception):
    """A rival that could not be measured; the text says why."""


class Worker:
    """A rival's process. Raises: Missing from the constructor and from `ask`."""

    def __init__(self, rival: str, threads: int, plan: Plan, model_dir: Path, scratch: Path) -> None:
        largest = (max(plan.streams), max(plan.prompt, plan.shared_prompt + 16), plan.output)
        sizes = largest if rival == "tally" else (largest[0], plan.prompt, plan.output)
        command = [sys.executable, "-m", "devnet.bench.engine_worker", rival, str(model_dir), str(scratch)]
        self.rival, self.threads = rival, threads
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._process = subprocess.Popen(
            [*command, str(threads), plan.device, *map(str, sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)},
        )
        self._answers = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._answers.register(self._process.stdout, selectors.EVENT_READ)
        self._read()

    def ask(self, **what: Any) -> Any:
        """What it measured."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise self._gone() from exc
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        if not self._answers.select(ANSWER_S):
            self.stop()
            raise Missing(f"no answer within {ANSWER_S} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        answer = json.loads(line)
        if "missing" in answer:
            raise Missing(answer["missing"])
        return answer.get("value")

    def _gone(self) -> Missing:
        """With the last thing it said."""
        status = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").split("\n")
        return Missing(f"its process ended with status {status}: {next(filter(None, reversed(lines)), 'no word')}")

    def stop(self) -> None:
        """Idempotent."""
        self._complaints.close()
        self._answers.close()
        self._process.kill()
        self._process.communicate()


def _start(
    plan: Plan, model_dir: Path, scratch: Path, stack: ExitStack, missing: dict[str, str], say: Callable[[str], None]
) -> list[Worker]:
    """Every rival with every number of threads; why one is not there goes into `missing`."""
    workers = []
    for rival in plan.rivals:
        for threads in plan.threads:
            say(f"starting {rival} with {threads} threads")
            try:
                worker = Worker(rival, threads, plan, model_dir, scratch)
                stack.callback(worker.stop)
                # a first wave, not counted: pages are touched, kernels chosen
                worker.ask(do="wave", wave=(max(plan.streams), plan.prompt, min(4, plan.output)), number=0)
            except Missing as exc:
                missing[f"{rival}, {threads} threads"] = str(exc)
            else:
                workers.append(worker)
    return workers


def _waves(
    plan: Plan, workers: list[Worker], missing: dict[str, str], say: Callable[[str], None]
) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Tokens a second, by streams, rival and threads: one value a repeat, rivals in turn within each repeat."""
    rates: dict[str, dict[str, dict[int, list[float]]]] = {str(n): {} for n in plan.streams}
    for repeat in range(plan.repeats):
        for streams in plan.streams:
            for worker in list(workers):
                who = f"{worker.rival}, {worker.threads} threads"
                say(f"repeat {repeat + 1} of {plan.repeats}, {streams} streams: {who}")
                wave = (streams, plan.prompt, plan.output)
                try:
                    seconds = worker.ask(do="wave", wave=wave, number=1 + repeat)
                except Missing as exc:
                    missing[who] = str(exc)
                    workers.remove(worker)
                else:
                    row = rates[str(streams)].setdefault(worker.rival, {})
                    row.setdefault(worker.threads, []).append(streams * plan.output / seconds)
    return rates


def _ours(plan: Plan, worker: Worker, say: Callable[[str], None]) -> dict[str, Any]:
    """What only our engine is asked: cost of sampling, prefix cache, memory bandwidth."""
    say("cost of seeded sampling and fingerprints")
    length = plan.prompt + plan.output
    share = {
        str(n): worker.ask(do="sampling", streams=n, length=length, rounds=20 * plan.repeats) for n in plan.streams
    }
    say(f"first token of a shared prompt of {plan.shared_prompt} tokens")
    pairs = [worker.ask(do="shared_prompt", length=plan.shared_prompt, number=i) for i in range(plan.repeats)]
    return {
        "sampling_share": {name: round(value, 5) for name, value in share.items()},
        "shared_prompt": {
            "tokens": plan.shared_prompt,
            "cold_ms": summary([1000 * cold for cold, _ in pairs]),
            "hit_ms": summary([1000 * hit for _, hit in pairs]),
            "sooner": summary([cold / hit for cold, hit in pairs]),
        },
        "bytes_per_s": round(worker.ask(do="bandwidth", size=BANDWIDTH_BYTES)),
    }


def measure_model(plan: Plan, name: str, scratch: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one model."""
    model_dir = random_model(name, scratch / name) if name in SHAPES else Path(name).absolute()
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        workers = _start(plan, model_dir, scratch, stack, missing, say)
        rates = _waves(plan, workers, missing, say)
        ours = next((worker for worker in workers if worker.rival == "tally"), None)
        own: dict[str, Any] = {}
        if ours is not None:
            try:
                own = _ours(plan, ours, say)
            except Missing as exc:
                missing["tally, measurements of its own"] = str(exc)
    weights = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    return {"missing": missing, **own, **evaluate(rates, weights, own.get("bytes_per_s"))}


def measure(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole result, ready for JSON."""
    started = time.perf_counter()
    result: dict[str, Any] = {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": {"start": facts.load()},
        "plan": {"prompt": plan.prompt, "output": plan.output, "repeats": plan.repeats, "device": plan.device},
        "models": {},
    }
    with tempfile.TemporaryDirectory(prefix="tally-bench-") as scratch:
        result["machine"] = facts.machine(Path(scratch))
        for name in plan.models:
            result["models"][name] = measure_model(
                plan,
                name,
                Path(scratch),
                lambda line, name=name: say(f"{name}: {line}"),  # type: ignore[misc]
            )
    result["load"]["end"] = facts.load()
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda line: progress.update(task, description=line)


def _numbers(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError as exc:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 1,16,32") from exc
    if min(numbers) < 1:
        raise click.BadParameter("numbers start at 1")
    return numbers


def _given(plan: Plan, **wanted: Any) -> Plan:
    return replace(plan, **{name: value for name, value in wanted.items() if value not in (None, ())})


@click.command()
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures nothing.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Where the JSON goes.")
@click.option("--models", multiple=True, help=f"A model directory, or {' or '.join(SHAPES)}; may be given repeatedly.")
@click.option("--rivals", multiple=True, type=click.Choice(RIVALS), help="These only; may be given repeatedly.")
@click.option("--streams", callback=_numbers, help="Numbers of streams, such as 1,16,32.")
@click.option("--threads", callback=_numbers, help="Numbers of threads to try each rival with, such as 1,2.")
@click.option("--repeats", type=click.IntRange(1), help="Values of each rival for each number of streams.")
@click.option("--prompt", type=click.IntRange(1), help="Tokens each stream reads.")
@click.option("--output", type=click.IntRange(1), help="Tokens each stream writes.")
@click.option("--device", default="cpu", show_default=True, help="A torch device; llama.cpp is measured on cpu only.")
def main(quick: bool, path: Path | None, device: str, **wanted: Any) -> None:
    """Tokens/s of our engine, llama.cpp and transformers over the same weights; prefix cache; cost of sampling."""
    plan = replace(Plan(), **QUICK) if quick else Plan()
    if device != "cpu":
        plan = replace(plan, device=device, streams=(1, 64), threads=(1,), rivals=("tally", "continuous", "generate"))
    plan = _given(plan, **wanted)
    with _progress() as say:
        result = measure(plan, say)
    show(result, Console())
    keep(result, path, "engine-")


if __name__ == "__main__":
    main()
