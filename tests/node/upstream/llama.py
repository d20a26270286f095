"""llama_cpp.server processes over the demo model."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

DEMO = Path("devnet/model/tally-demo-4m")
SERVED = "tally-demo-4m"


class Servers:
    """Starts servers and leaves none behind."""

    def __init__(self, gguf: Path) -> None:
        self.gguf = gguf
        self.started: list[subprocess.Popen[str]] = []

    def start(self) -> tuple[str, subprocess.Popen[str]]:
        """(URL ending in /v1, process), once it serves."""
        words = ["--model", str(self.gguf), "--model_alias", SERVED, "--host", "127.0.0.1", "--port", "0"]
        words += ["--n_ctx", "2048", "--n_threads", "1", "--n_threads_batch", "1", "--interrupt_requests", "false"]
        process = subprocess.Popen(
            [sys.executable, "-m", "llama_cpp.server", *words],
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        assert process.stderr is not None
        seen = ""
        for line in process.stderr:
            seen += line
            found = re.search(r"running on (http://127\.0\.0\.1:[0-9]+)", line)
            if found:
                # Its log goes on, and a full pipe would stop it.
                threading.Thread(target=process.stderr.read, daemon=True).start()
                return f"{found[1]}/v1", process
        raise AssertionError(f"the server did not start:\n{seen}")

    def stop(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
