"""One rival in a process of its own, so that thread pools and memory of one never slow another: it answers a line of
JSON for each line of JSON, and ends when its input does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from devnet.bench.engine_rivals import Place, Rival, Tally, Wave, make


def _answer(rival: Rival, asked: dict[str, Any]) -> Any:
    if asked["do"] == "wave":
        return rival.wave(Wave(*asked["wave"]), asked["number"])
    assert isinstance(rival, Tally)
    if asked["do"] == "shared_prompt":
        return rival.shared_prompt(asked["length"], asked["number"])
    if asked["do"] == "bandwidth":
        return rival.bandwidth(asked["size"])
    return rival.sampling_share(asked["streams"], asked["length"], asked["rounds"])


def main() -> None:
    """Arguments: rival, model directory, scratch directory, threads, device, largest wave's three numbers."""
    name, model_dir, scratch, threads, device, *largest = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")  # libraries print to stdout: only answers may go where it led
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    place = Place(Path(model_dir), Path(scratch), int(threads), device, Wave(*map(int, largest)))
    try:
        rival = make(name, place)
    except Exception as exc:  # noqa: BLE001 - whatever keeps a rival out is reported with the result
        say({"missing": f"{type(exc).__name__}: {exc}"})
        return
    say({"ready": True})
    for line in sys.stdin:
        try:
            say({"value": _answer(rival, json.loads(line))})
        except Exception as exc:  # noqa: BLE001 - as above
            say({"missing": f"{type(exc).__name__}: {exc}"})
    answers.flush()
    os._exit(0)  # transformers' manager thread would keep the process


if __name__ == "__main__":
    main()
