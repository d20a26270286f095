"""What a figure depends on besides our code: the machine, its load, its disk, the versions."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def processor() -> str:
    """Its model name, as far as the system says."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def sync_ms(folder: Path, times: int = 20) -> float:
    """Median time of writing one page and having it on the disk: what each step of a journal waits for. Unit: ms."""
    out = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(times):
            file.write(b"\0" * 4096)
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            out.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(out), 3)


def machine(folder: Path) -> dict[str, Any]:
    """`folder`: where the journals of the benchmark lie."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "fsync_ms": sync_ms(folder),
    }


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]
