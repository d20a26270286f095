"""The demo: one market from nothing to settled, with a client that hangs up and a provider that is killed mid-stream.

The walk: cluster up -> jobs over the OpenAI API, eight at once -> kill -9 of the provider that is writing -> the other
one continues -> the killed one comes back -> more jobs, one cancelled -> everything stops and settles -> the books of
all parties are held against the chain, and the interrupted text against an undisturbed run of the same seed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from devnet.audit import EVERYTHING, Audit, audit_market
from devnet.cluster import MODEL_DIR, MODEL_NAME, Cluster, ClusterOptions
from devnet.http_client import OpenAIClient, Reply, RequestFailed
from devnet.processes import NodeProcess
from incentives.ledger import Role
from node.chain.chain import Web3Chain
from node.engine.card import load_card
from node.engine.engine import TorchEngine
from node.gateway.text import TextCodec
from node.ports import EngineRequest, JobRow, Sampling
from node.store.store import SqlStore
from node.system import SystemClock
from protocol.errors import TallyError
from protocol.options import decode_options
from protocol.units import JobId

JOBS: Final = 24
AT_ONCE: Final = 8
LENGTHS: Final = (16, 33, 64, 100, 150, 220)
"""Output tokens asked for, in turn: below, at, and above the 32 of one increment."""

KILL_AFTER_CHARACTERS: Final = 200
"""Text seen before the kill: some two increments, so that there is something acknowledged and something under way."""

LONG: Final = 480
"""Output tokens of the stream whose provider is killed: long enough to be still running then."""

WORDS: Final = (
    "river",
    "house",
    "light",
    "king",
    "bread",
    "ship",
    "stone",
    "music",
    "winter",
    "letter",
    "road",
    "glass",
)
OPENING: Final = "In the beginning God created the heaven and the earth. And the"
SAMPLED: Final = {"temperature": 0.8, "top_p": 0.95}

Say = Callable[[str], None]


@dataclass(slots=True)
class DemoResult:
    """What `--json` prints. Amounts in wei."""

    jobs_ok: int = 0
    jobs_failed: int = 0
    jobs_cancelled: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    receipts_signed: int = 0
    receipts_acknowledged: int = 0
    settled_wei: int = 0
    paid_wei: int = 0
    lost_to_kill_wei: int = 0
    protocol_fee_wei: int = 0
    gas_per_pair: int = 0
    conservation_ok: bool = False
    failover_text_identical: bool = False
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    parties: list[dict[str, Any]] = field(default_factory=list)


class DemoFailed(TallyError):
    """The demo could not show what it is there to show."""


class Demo:
    """One run. `say` gets a line per step; `progress` how many jobs are done, of JOBS."""

    def __init__(self, home: Path, say: Say, progress: Callable[[int], None]) -> None:
        self._home = home
        self._say = say
        self._progress = progress
        self._done = 0
        self.result = DemoResult()

    async def run(self) -> DemoResult:
        """Raises: TallyError when something could not even be started."""
        start = time.perf_counter()
        self._say("starting a chain, contracts, two providers and a gateway")
        async with Cluster(ClusterOptions(self._home)) as cluster:
            self._say(f"serving at {cluster.url}")
            async with OpenAIClient(cluster.url, cluster.api_key) as client:
                killed = await self._serve(cluster, client)
            self._say("stopping the nodes: they settle")
            await cluster.gateway.stop()
            await asyncio.gather(*(node.stop() for node in cluster.providers))
            self._say("holding every party's books against the chain")
            audit = await self._audit(cluster)
            self._say("writing the interrupted text again, undisturbed, from its seed")
            self.result.failover_text_identical = await self._identical(cluster, killed)
        self._fill(audit)
        self.result.seconds = round(time.perf_counter() - start, 2)
        return self.result

    async def _serve(self, cluster: Cluster, client: OpenAIClient) -> Reply:
        """All the jobs. Returns the reply of the stream that lived through the kill."""
        await self._batch(client, range(0, 11))
        self._say("killing the provider that writes (kill -9) in the middle of its stream")
        killed, node = await self._killed(cluster, client)
        node.start()
        await node.wait_ready()
        self._say(f"{node.name} is back; one client hangs up in the middle of its stream")
        cancelled = asyncio.create_task(self._cancelled(client))
        await self._batch(client, range(12, 23))
        await cancelled
        return killed

    async def _batch(self, client: OpenAIClient, numbers: range) -> None:
        """Chat jobs of mixed length, AT_ONCE at a time."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            body = {
                "model": MODEL_NAME,
                "messages": [{"role": "user", "content": f"Define the word {WORDS[number % len(WORDS)]}."}],
                "max_tokens": LENGTHS[number % len(LENGTHS)],
                **SAMPLED,
            }
            async with gate:
                try:
                    self._count(await client.complete("/chat/completions", body))
                except RequestFailed as exc:
                    self.result.jobs_failed += 1
                    self.result.problems.append(f"job {number}: {exc}")
            self._step()

        await asyncio.gather(*(one(number) for number in numbers))

    def _count(self, reply: Reply) -> None:
        self.result.jobs_ok += 1
        self.result.prompt_tokens += reply.usage.get("prompt_tokens", 0)
        self.result.completion_tokens += reply.usage.get("completion_tokens", 0)

    def _step(self) -> None:
        self._done += 1
        self._progress(self._done)

    def _long(self, client: OpenAIClient, reply: Reply) -> AsyncIterator[str]:
        body = {"model": MODEL_NAME, "prompt": OPENING, "max_tokens": LONG, **SAMPLED}
        return client.stream("/completions", body, reply)

    async def _killed(self, cluster: Cluster, client: OpenAIClient) -> tuple[Reply, NodeProcess]:
        """Kill the provider of a long stream while it writes. Tried again when a stream ended by itself before."""
        by_wallet = {"0x" + w.address.hex(): node for w, node in zip(cluster.wallets, cluster.providers, strict=True)}
        for _ in range(8):
            reply, victim = Reply(), None
            async for _ in self._long(client, reply):
                if victim is None and len(reply.text) >= KILL_AFTER_CHARACTERS:
                    victim = by_wallet[reply.provider]
                    victim.kill()
            if victim is not None:
                self._count(reply)
                self._step()
                return reply, victim
        raise DemoFailed("the model ended every long text early, so no provider could be killed in the middle of one")

    async def _cancelled(self, client: OpenAIClient) -> None:
        reply = Reply()
        async with aclosing(self._long(client, reply)) as pieces:  # type: ignore[type-var]
            async for _ in pieces:
                if len(reply.text) >= KILL_AFTER_CHARACTERS // 2:
                    break
        self.result.jobs_cancelled += 1
        self._step()

    async def _audit(self, cluster: Cluster) -> Audit:
        chain = Web3Chain(cluster.anvil.rpc_url, cluster.deployment, None, clock=SystemClock())
        await chain.start()
        try:
            providers = [
                (node.name, node.home, wallet.address)
                for node, wallet in zip(cluster.providers, cluster.wallets, strict=True)
            ]
            return await audit_market(chain, providers, [("gateway", cluster.gateway.home)])
        finally:
            await chain.stop()

    async def _identical(self, cluster: Cluster, killed: Reply) -> bool:
        """Whether the text of two providers is what one would have written from the same seed."""
        store = SqlStore(cluster.gateway.home / "journal.db")
        await store.open()
        try:
            job = await self._first_job(store, killed)
        finally:
            await store.close()
        engine = TorchEngine(MODEL_DIR, slots=1)
        await engine.start()
        try:
            codec = TextCodec(load_card(MODEL_DIR, MODEL_NAME, engine.profile, engine.max_context))
            request = job.request
            sampling = Sampling(request.temperature_micro, request.top_p_micro, request.top_k)
            prompt = codec.encode_text(OPENING)
            options = decode_options(job.options)
            tokens = await engine.submit(EngineRequest(prompt, job.accept.seed, request.max_tokens, sampling, options))
            text = codec.decode([token.token_id async for token in tokens])
        finally:
            await engine.stop()
        return bool(text == killed.text)

    async def _first_job(self, store: SqlStore, killed: Reply) -> JobRow:
        """The job whose provider was killed, which must have a successor that names it as its parent."""
        jobs = await store.jobs(Role.CLIENT, limit=EVERYTHING)
        first = await store.job(JobId(bytes.fromhex(killed.job.partition(",")[0].removeprefix("0x"))))
        if first is None or not any(bytes(job.request.parent_job) == bytes(first.job_id) for job in jobs):
            raise DemoFailed("the killed stream was not continued by another provider")
        return first

    def _fill(self, audit: Audit) -> None:
        result = self.result
        result.receipts_signed = audit.receipts_signed
        result.receipts_acknowledged = audit.receipts_acknowledged
        result.settled_wei, result.paid_wei = audit.settled_wei, audit.paid_wei
        result.lost_to_kill_wei = audit.lost_wei
        result.protocol_fee_wei = audit.protocol_fee_wei
        result.gas_per_pair = audit.gas // audit.pairs if audit.pairs else 0
        result.conservation_ok = not audit.broken
        result.problems += audit.broken
        result.parties = [asdict(party) for party in audit.parties]
