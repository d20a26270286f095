"""The two sides of the serving benchmarks, kept running together: the bare engine, and a market with one provider.

Only one of them is given work at a time; the other one waits and uses no processor.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from devnet.bench.worker import KEY_VARIABLE, Worker
from devnet.bench.workload import SLOTS, Sample, Workload, prompts, quantile, summary
from devnet.cluster import MODEL_NAME, Cluster, ClusterOptions

RATIO_AIM: Final = 0.95
"""Least share of the bare engine's tokens/s that should come out of the gateway."""

TTFT_AIM_MS: Final = 15.0
"""Most that the median time to the first token may grow."""

DEPOSIT: Final = "2000"
"""TALLY in the client's channel: enough that no top-up waits for the chain in the middle of a measurement."""

Step = Callable[[str], None]


@dataclass(slots=True)
class Sides:
    """Both sides, ready. `processes`: name -> pid of what the full path consists of."""

    work: Workload
    bare: Worker
    full: Worker
    processes: dict[str, int]
    _next: int = field(default=1)

    def fresh(self, streams: int, rounds: int) -> list[list[str]]:
        """Prompts that neither side has seen."""
        first, self._next = self._next, self._next + streams * rounds
        return prompts(first, streams, rounds)

    async def run_bare(self, streams: list[list[str]], max_tokens: int) -> Sample:
        return await _measured(self.bare, streams, max_tokens, {"engine": self.bare.pid})

    async def run_full(self, streams: list[list[str]], max_tokens: int) -> Sample:
        return await _measured(self.full, streams, max_tokens, self.processes)


@asynccontextmanager
async def both_sides(work: Workload, home: Path) -> AsyncIterator[Sides]:
    """Start both and warm them up. Raises: ProcessFailed, WorkerFailed."""
    options = ClusterOptions(
        home,
        providers=1,
        slots=SLOTS,
        settle_interval="1h",
        model_dir=work.model_dir,
        provider_config={"model_name": work.model},
        client_config={"deposit": DEPOSIT},
    )
    async with Cluster(options) as cluster, Worker("engine", str(work.model_dir)) as bare:
        key = {KEY_VARIABLE: cluster.api_key}
        async with Worker("http", cluster.url, work.model, env=key) as full:
            processes = {"provider": cluster.providers[0].pid, "gateway": cluster.gateway.pid, "client": full.pid}
            sides = Sides(work, bare, full, processes)
            for streams in (1, max(work.streams)):
                asked = sides.fresh(streams, 1)
                await sides.run_bare(asked, work.max_tokens)
                await sides.run_full(asked, work.max_tokens)
            yield sides


async def _measured(worker: Worker, streams: list[list[str]], max_tokens: int, pids: dict[str, int]) -> Sample:
    before = {name: _cpu(pid) for name, pid in pids.items()}
    sample = await worker.run(streams, max_tokens)
    sample.cpu = {name: _cpu(pid) - before[name] for name, pid in pids.items()}
    return sample


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def throughput(sides: Sides, say: Step) -> dict[str, Any]:
    """Tokens/s of both sides by number of streams, the two in turn and each first as often as the other."""
    out: dict[str, Any] = {}
    for streams in sides.work.streams:
        bare: list[Sample] = []
        full: list[Sample] = []
        for repeat in range(sides.work.repeats):
            say(f"{streams} streams, {repeat + 1} of {sides.work.repeats}")
            asked = sides.fresh(streams, sides.work.rounds)
            turns = [(bare, sides.run_bare), (full, sides.run_full)]
            for samples, run in turns if repeat % 2 == 0 else turns[::-1]:
                samples.append(await run(asked, sides.work.max_tokens))
        out[str(streams)] = _compared(bare, full)
    return out


def _compared(bare: list[Sample], full: list[Sample]) -> dict[str, Any]:
    """`ratio`: of neighbours in time, so that a load which comes and goes cancels."""
    ratios = [b.rate and f.rate / b.rate for b, f in zip(bare, full, strict=True)]
    ratio = statistics.median(ratios)
    return {
        "bare_tokens_per_s": summary([sample.rate for sample in bare], 1),
        "full_tokens_per_s": summary([sample.rate for sample in full], 1),
        "ratio": summary(ratios),
        "ratio_of_medians": round(statistics.median(s.rate for s in full) / statistics.median(s.rate for s in bare), 4),
        "aim": RATIO_AIM,
        "met": ratio >= RATIO_AIM,
        "mean_output_tokens": {
            "bare": round(sum(s.tokens for s in bare) / sum(len(s.first_s) for s in bare), 1),
            "full": round(sum(s.tokens for s in full) / sum(len(s.first_s) for s in full), 1),
        },
        "cpu_s_per_1k_tokens": {**_cpu_per_1k("bare_", bare), **_cpu_per_1k("", full)},
        "cores_busy": {"bare": _cores(bare), "full": _cores(full)},
    }


def _cpu_per_1k(prefix: str, samples: list[Sample]) -> dict[str, float]:
    tokens = sum(sample.tokens for sample in samples)
    return {
        prefix + name: round(1000 * sum(sample.cpu[name] for sample in samples) / tokens, 4) for name in samples[0].cpu
    }


def _cores(samples: list[Sample]) -> float:
    """Processors' worth of work while it ran."""
    return round(sum(sum(s.cpu.values()) for s in samples) / sum(s.seconds for s in samples), 2)


async def first_token(sides: Sides, say: Step) -> dict[str, Any]:
    """What the path adds to the time to the first token: one request at a time, the two sides in turn."""
    bare: list[float] = []
    full: list[float] = []
    for number in range(sides.work.ttft_samples):
        say(f"first token, {number + 1} of {sides.work.ttft_samples}")
        asked = sides.fresh(1, 1)
        bare += (await sides.run_bare(asked, 8)).first_s
        full += (await sides.run_full(asked, 8)).first_s
    added = [1000 * (f - b) for b, f in zip(bare, full, strict=True)]
    p50 = quantile(added, 0.5)
    return {
        "bare_ms": summary([1000 * value for value in bare], 2),
        "full_ms": summary([1000 * value for value in full], 2),
        "added_ms": {**summary(added, 2), "p95": round(quantile(added, 0.95), 2)},
        "aim_ms": TTFT_AIM_MS,
        "met": math.isfinite(p50) and p50 <= TTFT_AIM_MS,
    }


def shipped() -> str:
    """Name of the model that lies in the repository."""
    return MODEL_NAME
