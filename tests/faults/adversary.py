"""`python -m tests.faults.adversary ...`: `tally ...` whose engine needs no model, and which errs when it is told to.

Told by `behave.json` in the data directory, read whenever it matters, so that one process can play several parts:
`hold` (the engine stops before this output token), `lie` (receipts from this step on are a wei too high), `deadline_s`
(of the jobs that a gateway asks for). Transport, store, chain, receipts and money are the node's own.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

from node.ports import JobSpec, ModelCard
from protocol.eip712 import hash_struct
from protocol.messages import Profile, WorkReceipt
from protocol.units import FinishReason, Wei
from protocol.work import Work
from tests.twins.engine_twin import EOS, EngineTwin

MODEL = "twin-model"
VOCABULARY = 4096
BEHAVIOUR = "behave.json"


def home() -> Path:
    """The data directory on our command line."""
    return Path(sys.argv[sys.argv.index("--home") + 1])


def told(key: str) -> Any:
    """What we are told to do now; None for nothing."""
    try:
        return json.loads((home() / BEHAVIOUR).read_text()).get(key)
    except FileNotFoundError:
        return None


def tell(where: Path, **orders: Any) -> None:
    """Give orders to the process of that data directory."""
    part = where / f"{BEHAVIOUR}.part"
    part.write_text(json.dumps(orders))
    part.replace(where / BEHAVIOUR)


@functools.cache
def tokenizer_json() -> bytes:
    """One word per token id, so that tokens can be counted in the text: `t5 t6 ...`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()


class PacedEngine(EngineTwin):
    """The engine twin, as TorchEngine is constructed."""

    def __init__(self, model_dir: Path, dtype: str = "auto", slots: int = 8, **_: Any) -> None:
        super().__init__(slots=slots, vocab_size=VOCABULARY)
        self.profile = replace(self.profile, tokenizer_hash=hashlib.sha256(tokenizer_json()).digest())
        self.pace = self._withheld

    async def _withheld(self, index: int) -> None:
        while (hold := told("hold")) is not None and index >= hold:
            await asyncio.sleep(0.01)


def card(model_dir: Path, model: str, served: Profile, max_context: int) -> ModelCard:
    return ModelCard(model, hash_struct(served), served, tokenizer_json(), "", {}, (EOS,), max_context)


class TemptedWork(Work):
    """A provider's account that overcharges when told to. What it signs, it signs with its own key."""

    def receipt(self, finish: FinishReason, finished_at: int, vouched: Wei) -> tuple[Work, WorkReceipt]:
        work, receipt = super().receipt(finish, finished_at, vouched)
        lie = told("lie")
        return work, replace(receipt, total=receipt.total + 1) if lie and receipt.step >= lie else receipt

    @classmethod
    def start(cls, *args: Any) -> Work:
        work = Work.start(*args)
        return cls(**{name: getattr(work, name) for name in Work.__dataclass_fields__})


def _impatient(*args: Any, **fields: Any) -> JobSpec:
    spec = JobSpec(*args, **fields)
    deadline = told("deadline_s")
    return replace(spec, deadline_s=deadline) if deadline else spec


def main() -> None:
    for name, content in {
        "node.engine.engine": {"TorchEngine": PacedEngine},
        "node.engine.card": {"load_card": card},
    }.items():
        stand_in = types.ModuleType(name)
        stand_in.__dict__.update(content)
        sys.modules[name] = stand_in
    import node.discovery.directory
    import node.provider.server

    node.discovery.directory.REFRESH_S = 0.5  # type: ignore[misc]
    node.provider.server.Work = TemptedWork  # type: ignore[misc]
    if "gateway" in sys.argv:
        import node.gateway.jobs

        node.gateway.jobs.JobSpec = _impatient  # type: ignore[assignment,misc]
    from node.cli.main import main as tally

    tally()


if __name__ == "__main__":
    main()
