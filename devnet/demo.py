"""The demo: one market from nothing to settled and judged, with a kill, a client that hangs up, a cheat and a liar.

The walk: cluster up -> jobs over the OpenAI API, eight at once -> kill -9 of the provider that is writing -> the other
one continues -> the killed one comes back -> more jobs, one cancelled, and some served by a third provider that
computes something cheaper than it sells -> validators audit every job, one of them without looking -> the Court's cases
end -> everything stops and settles -> the books and stakes of all parties are held against the chain, and the
interrupted text against an undisturbed run of the same seed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from devnet.audit import EVERYTHING, Audit, audit_market
from devnet.cases import CourtWatch, jobs_receipted, open_court, told
from devnet.cluster import MODEL_DIR, MODEL_NAME, Cluster, ClusterOptions
from devnet.costs import computed_s
from devnet.exhibits import exhibits
from devnet.http_client import OpenAIClient, Reply, RequestFailed
from devnet.processes import NodeProcess
from devnet.stakes import StakeReader, Stakes
from incentives.ledger import Role
from node.chain.chain import Web3Chain
from node.engine.card import load_card
from node.engine.engine import TorchEngine
from node.gateway.text import TextCodec
from node.ports import CaseState, EngineRequest, JobRow, Sampling
from node.store.store import SqlStore
from node.system import SystemClock
from protocol.errors import TallyError
from protocol.options import decode_options
from protocol.units import JobId

HONEST_JOBS: Final = 24
CHEATED_JOBS: Final = 4
JOBS: Final = HONEST_JOBS + CHEATED_JOBS
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
CHEATER: Final = "provider-3"
LIAR: Final = "validator-4"
CHEATS: Final = {CHEATER: "int4", LIAR: "rubber-stamps"}
"""Who cheats, and how (devnet/adversaries): one sells the model and computes it in 4 bits, one votes PASS unseen."""

VALIDATORS: Final = 4

JUDGED_WITHIN_S: Final = 75.0
"""For all cases to end once the last job has. Unit: s. An epoch, a draw, a round, an appeal and an answer window take
half of it; a case that needs more is not shown to work."""

EXHIBITS: Final = 5
"""Tokens of the cheat that are shown."""

OPENING: Final = "In the beginning God created the heaven and the earth. And the"
SAMPLED: Final = {"temperature": 0.8, "top_p": 0.95}

Say = Callable[[str], None]


@dataclass(slots=True)
class DemoResult:
    """What `--json` prints. Amounts in wei.

    `audits`: cases that ended with a verdict. `cheaters`, `cheaters_slashed`: of CHEATS, and those of them that lost
    stake; `honest_slashed`: others that did. `audit_cost_ratio`: seconds that all validators replayed over seconds that
    all engines computed. Here each job is audited, by three or four validators; a settled market audits one in fifty.
    """

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
    audits: int = 0
    cheaters: int = len(CHEATS)
    cheaters_slashed: int = 0
    honest_slashed: int = 0
    slashed_wei: int = 0
    audit_cost_ratio: float = 0.0
    conservation_ok: bool = False
    failover_text_identical: bool = False
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    parties: list[dict[str, Any]] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    exhibits: list[dict[str, Any]] = field(default_factory=list)
    stakes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether everything was shown that the demo is there to show."""
        justice = self.cheaters_slashed == self.cheaters and not self.honest_slashed
        return self.conservation_ok and self.failover_text_identical and not self.jobs_failed and justice


class DemoFailed(TallyError):
    """The demo could not show what it is there to show."""


class Demo:
    """One run. `say` gets a line per step; `progress` how many jobs are done, of JOBS."""

    def __init__(self, home: Path, say: Say, progress: Callable[[int], None]) -> None:
        self._home = home
        self._say = say
        self._progress = progress
        self._done = 0
        self._only: list[str] = []
        self._busy_s = 0.0  # of engines whose process was killed since
        self.result = DemoResult()

    async def run(self) -> DemoResult:
        """Raises: TallyError when something could not even be started."""
        start = time.perf_counter()
        self._say(
            "starting a chain, contracts, three providers, a gateway and four validators; two of these will cheat"
        )
        async with Cluster(ClusterOptions(self._home, 3, VALIDATORS, adversaries=CHEATS)) as cluster:
            self._say(f"serving at {cluster.url}")
            await cluster.validators_ready()
            async with OpenAIClient(cluster.url, cluster.api_key) as client:
                killed = await self._serve(cluster, client)
            self._say("waiting for the verdicts on every job")
            watch = await self._judge(cluster)
            self._say("stopping the nodes: they settle")
            await cluster.gateway.stop()
            await asyncio.gather(*(node.stop() for node in (*cluster.providers, *cluster.validators)))
            self._say("holding every party's books and stakes against the chain")
            audit, stakes = await self._audit(cluster)
            self._say("writing the interrupted text again, undisturbed, from its seed")
            codec, text = await self._again(cluster, killed)
            self.result.failover_text_identical = text == killed.text
            await self._show(cluster, watch, codec)
        self._fill(audit)
        self._judged(watch, stakes)
        self.result.seconds = round(time.perf_counter() - start, 2)
        return self.result

    async def _serve(self, cluster: Cluster, client: OpenAIClient) -> Reply:
        """All the jobs. Returns the reply of the stream that lived through the kill."""
        self._only = _wallets(cluster, (node.name for node in cluster.providers if node.name not in CHEATS))
        await self._batch(client, range(0, 11))
        self._say("killing the provider that writes (kill -9) in the middle of its stream")
        killed, node = await self._killed(cluster, client)
        node.start()
        await node.wait_ready()
        self._say(f"{node.name} is back; one client hangs up in the middle of its stream")
        cancelled = asyncio.create_task(self._cancelled(client))
        await self._batch(client, range(12, 23))
        await cancelled
        self._say(f"{CHEATER} sells the same model at the same price; {CHEATS[CHEATER]} is what it runs")
        self._only = _wallets(cluster, [CHEATER])
        await self._batch(client, range(HONEST_JOBS, JOBS))
        return killed

    async def _batch(self, client: OpenAIClient, numbers: range) -> None:
        """Chat jobs of mixed length, AT_ONCE at a time."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            body = {
                "model": MODEL_NAME,
                "messages": [{"role": "user", "content": f"Define the word {WORDS[number % len(WORDS)]}."}],
                "max_tokens": LENGTHS[number % len(LENGTHS)],
                "x_tally": {"only": self._only},
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
        body = {"model": MODEL_NAME, "prompt": OPENING, "max_tokens": LONG, "x_tally": {"only": self._only}, **SAMPLED}
        return client.stream("/completions", body, reply)

    async def _killed(self, cluster: Cluster, client: OpenAIClient) -> tuple[Reply, NodeProcess]:
        """Kill the provider of a long stream while it writes. Tried again when the stream ended by itself before, or
        when all of it was out already. What its engine computed is read before, so that nothing delays the kill."""
        by_wallet = dict(zip(_wallets(cluster, (n.name for n in cluster.providers)), cluster.providers, strict=True))
        for _ in range(8):
            reply, victim = Reply(), None
            busy_s = {node.name: await computed_s([node], "busy_s") for node in cluster.providers}
            async for _ in self._long(client, reply):
                if victim is None and len(reply.text) >= KILL_AFTER_CHARACTERS:
                    victim = by_wallet[reply.provider]
                    victim.kill()
            if victim is None:
                continue
            self._busy_s += busy_s[victim.name]
            if len(reply.usage["tally"]["jobs"]) > 1:
                self._count(reply)
                self._step()
                return reply, victim
            victim.start()
            await victim.wait_ready()
        raise DemoFailed("every long text was out before its provider could be killed in the middle of it")

    async def _cancelled(self, client: OpenAIClient) -> None:
        reply = Reply()
        async with aclosing(self._long(client, reply)) as pieces:  # type: ignore[type-var]
            async for _ in pieces:
                if len(reply.text) >= KILL_AFTER_CHARACTERS // 2:
                    break
        self.result.jobs_cancelled += 1
        self._step()

    async def _judge(self, cluster: Cluster) -> CourtWatch:
        """Follow the Court until every case of the jobs that ran is over."""
        async with open_court(cluster.anvil.rpc_url, cluster.deployment) as court:
            watch = CourtWatch(court, cluster.names, lambda case: self._say(told(case)))
            jobs = await jobs_receipted(cluster.gateway)
            if not await watch.until_over(jobs, JUDGED_WITHIN_S):
                self.result.problems.append(
                    f"after {JUDGED_WITHIN_S:.0f} s not every job was judged: {watch.standing()}"
                )
        busy_s = self._busy_s + await computed_s(cluster.providers, "busy_s")
        self.result.audit_cost_ratio = round(await computed_s(cluster.validators, "replay_s") / busy_s, 3)
        return watch

    async def _audit(self, cluster: Cluster) -> tuple[Audit, Stakes]:
        clock = SystemClock()
        chain = Web3Chain(cluster.anvil.rpc_url, cluster.deployment, None, clock=clock)
        await chain.start()
        try:
            providers = [
                (node.name, node.home, wallet.address)
                for node, wallet in zip(cluster.providers, cluster.wallets, strict=True)
            ]
            audit = await audit_market(chain, providers, [("gateway", cluster.gateway.home)])
        finally:
            await chain.stop()
        async with StakeReader(cluster.anvil.rpc_url, cluster.deployment, clock) as reader:
            stakes = await reader.stakes(cluster.staked)
            await reader.conserve(audit, stakes, cluster.accounts)
        return audit, stakes

    async def _again(self, cluster: Cluster, killed: Reply) -> tuple[TextCodec, str]:
        """What one provider alone would have written from the seed of the killed stream; and how to read tokens."""
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
            return codec, codec.decode([token.token_id async for token in tokens])
        finally:
            await engine.stop()

    async def _show(self, cluster: Cluster, watch: CourtWatch, codec: TextCodec) -> None:
        """The worst tokens of the first case that the cheat lost, in words."""
        lost = next((case for case in watch.cases.values() if case.guilty and case.provider == CHEATER), None)
        if lost is None:
            self.result.problems.append(f"no case against {CHEATER} ended with a guilty verdict")
            return
        journals = [node.home / "journal.db" for node in cluster.validators if node.name not in CHEATS]
        shown = await exhibits(journals, cluster.gateway.home / "journal.db", lost.id, codec.decode, EXHIBITS)
        self.result.exhibits = [asdict(exhibit) for exhibit in shown]

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

    def _judged(self, watch: CourtWatch, stakes: Stakes) -> None:
        result = self.result
        slashed = {stake.name for stake in stakes.parties if stake.slashed}
        result.audits = sum(case.state is CaseState.CLOSED for case in watch.cases.values())
        result.cheaters_slashed = len(slashed & CHEATS.keys())
        result.honest_slashed = len(slashed - CHEATS.keys())
        result.slashed_wei = sum(stake.slashed for stake in stakes.parties)
        result.problems += [f"{name} is honest and was slashed" for name in sorted(slashed - CHEATS.keys())]
        result.problems += [
            f"{name} cheated ({CHEATS[name]}) and lost nothing" for name in sorted(CHEATS.keys() - slashed)
        ]
        result.cases = [case.as_json() for case in watch.cases.values()]
        result.stakes = [stake.as_json(stakes.slashes) for stake in stakes.parties]


def _wallets(cluster: Cluster, names: Iterable[str]) -> list[str]:
    """Wallets of providers, as the gateway takes and tells them."""
    found = {node.name: wallet for node, wallet in zip(cluster.providers, cluster.wallets, strict=True)}
    return ["0x" + found[name].address.hex() for name in names]
