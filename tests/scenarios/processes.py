"""The stage of real processes: Anvil, providers and gateways of their own, over the OpenAI API, killed with kill -9.

Nodes are `tests.faults.adversary`: the node's own code with an engine that needs no model and obeys orders.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from devnet.anvil import Anvil, AnvilOptions
from devnet.audit import Audit, audit_market
from devnet.cluster import Cluster, ClusterOptions
from devnet.processes import NodeProcess
from incentives.ledger import ChannelKey
from node.chain.chain import Web3Chain
from node.gateway.control import ControlClient
from node.store.store import SqlStore
from node.system import SystemClock
from protocol.units import Address, JobId, Wei
from tests.faults.adversary import MODEL, tell
from tests.scenarios import vocabulary as v
from tests.twins.engine_twin import EngineTwin

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 40.0
"""For anything expected to come true on busy cores. Unit: s."""

STALL = "3s"


def _tally(factor: int, wei: int) -> str:
    """Wei per token as TALLY per million."""
    return f"{factor * wei * 10**6 / 10**18:.6f}"


def prices(factor: int) -> dict[str, str]:
    return {
        "prompt_price": _tally(factor, v.PROMPT_PRICE),
        "cached_price": _tally(factor, v.PROMPT_PRICE // 10),
        "completion_price": _tally(factor, v.TOKEN_PRICE),
        "reasoning_price": _tally(factor, v.TOKEN_PRICE),
    }


def options(home: Path, providers: int = 2, **changes: Any) -> ClusterOptions:
    sold = {
        "model_name": MODEL,
        "settle_interval": "1s",
        "settle_dust": "0",
        "drain": "2s",
        "priority_factor": "1",
        "priority_ttft_ms": str(v.TTFT_MS),
        "priority_tpot_ms": str(v.TPOT_MS),
        "refund_share": str(v.REFUND_BPS / 10_000),
    }
    values: dict[str, Any] = {
        "provider_config": sold,
        "each_config": (prices(1), prices(v.DEARER))[:providers],
        "client_config": {"stall": STALL},
        "env": {"PYTHONPATH": str(REPOSITORY)},
        "module": "tests.faults.adversary",
    }
    return ClusterOptions(home, providers, **(values | changes))


@dataclass
class Reading:
    """One request as its reader has it."""

    step: v.Ask
    words: list[str] = field(default_factory=list)
    jobs: str = ""
    finish: str = ""
    error: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None


class ProcessStage:
    """`async with ProcessStage(tmp_path) as stage`; `audit` stops everything and compares the books."""

    def __init__(self, home: Path, **changes: Any) -> None:
        self.cluster = Cluster(options(home, **changes))
        self.jobs: dict[str, Reading] = {}
        self.ended: list[Reading] = []
        self.clients: dict[str, NodeProcess] = {}
        self.sessions: dict[str, Address] = {}
        self._keys: dict[str, str] = {}
        self._claimed_before: dict[tuple[str, str], int] = {}
        self._vouched_before: dict[str, int] = {}
        self._orders: dict[str, dict[str, Any]] = {}
        self._anvil: Anvil | None = None

    async def __aenter__(self) -> ProcessStage:
        await self.cluster.__aenter__()
        try:
            names = (v.PROVIDER, v.OTHER)
            self.providers = dict(zip(names, self.cluster.providers, strict=False))
            self.wallets = dict(zip(names, self.cluster.wallets, strict=False))
            self._take_client(v.CLIENT, self.cluster.gateway)
            self.http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S * 2))
            self.chain = Web3Chain(self.cluster.anvil.rpc_url, self.cluster.deployment, None, clock=SystemClock())
            await self.chain.start()
        except BaseException:
            await self.cluster.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        for node in [*self.providers.values(), *self.clients.values()]:
            node.signal(signal.SIGCONT)
        for reading in self.jobs.values():
            if reading.task is not None:
                reading.task.cancel()
        await self.http.close()
        await self.chain.stop()
        await self.cluster.__aexit__(*exc)
        if self._anvil is not None:
            self._anvil.stop()

    def _take_client(self, name: str, node: NodeProcess) -> None:
        self.clients[name] = node
        self.sessions[name] = Address(bytes.fromhex(node.ready["session_key"][2:]))
        self._keys[name] = node.ready.get("api_key") or self._keys[name]

    def node(self, who: str) -> NodeProcess:
        return self.providers.get(who) or self.clients[who]

    async def status(self, who: str) -> dict[str, Any]:
        """Raises: ControlUnavailable."""
        return await self._call(who, "status")

    async def _call(self, who: str, route: str) -> dict[str, Any]:
        client = ControlClient(self.node(who).home / "control.sock")
        return await asyncio.to_thread(client.call_now, route, 20.0)

    async def _eventually(self, what: str, true: Callable[[], Awaitable[bool]]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not await true():
            assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what} (in {self.cluster.home})"
            await asyncio.sleep(0.05)

    async def claimed(self, provider: str, client: str) -> int:
        if client not in self.sessions:
            return 0
        slot = await self.chain.slot(ChannelKey(self.wallets[provider].address, self.sessions[client]))
        return slot.claimed if slot else 0

    async def begin(self) -> None:
        self.ended += [reading for reading in self.jobs.values() if reading.finish]
        self.jobs.clear()
        for provider in self.providers:
            self._vouched_before[provider] = int((await self.status(provider))["vouched_wei"])
            for client in self.clients:
                self._claimed_before[provider, client] = await self.claimed(provider, client)

    async def rest(self) -> None:
        for provider in self.providers:

            async def quiet(provider: str = provider) -> bool:
                return (await self.status(provider))["jobs_running"] == 0

            await self._eventually(f"{provider} has nothing to do", quiet)

    # ------------------------------------------------------------------------------------------------- what they do

    def _order(self, who: str, **orders: Any) -> None:
        merged = self._orders.setdefault(who, {}) | orders
        self._orders[who] = merged
        tell(self.node(who).home, **merged)

    async def act_hold(self, step: v.Hold) -> None:
        self._order(step.who, hold=step.at)

    async def act_release(self, step: v.Release) -> None:
        self._order(step.who, hold=None)

    async def act_lie(self, step: v.Lie) -> None:
        self._order(step.who, lie=step.step)

    async def act_purse(self, step: v.Purse) -> None:
        self._take_client(v.POOR, await self.cluster.add_client(v.POOR, Wei(v.Work(step.tokens).at_least())))

    async def act_ask(self, step: v.Ask) -> None:
        self._order(step.by, deadline_s=step.deadline_s)
        reading = self.jobs[step.job] = Reading(step)
        reading.task = asyncio.create_task(self._follow(reading))

    async def _follow(self, reading: Reading) -> None:
        """One streamed request, read to whatever end it has."""
        step = reading.step
        body = {
            "model": MODEL,
            "prompt": list(step.prompt),
            "max_tokens": step.tokens,
            "service_tier": step.tier,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Authorization": f"Bearer {self._keys[step.by]}"}
        url = f"{self.clients[step.by].ready['url']}/completions"
        try:
            async with self.http.post(url, json=body, headers=headers) as answer:
                reading.jobs = answer.headers.get("x-tally-job", "")
                if answer.status != 200:
                    reading.error = (await answer.json())["error"]["code"]
                    return
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        self._take(reading, json.loads(line[6:]))
        except aiohttp.ClientError as exc:
            reading.error = f"connection: {exc}"

    def _take(self, reading: Reading, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            reading.error = chunk["error"]["code"]
        reading.usage = chunk.get("usage") or reading.usage
        for choice in chunk.get("choices", ()):
            reading.words += choice["text"].split()
            reading.finish = choice["finish_reason"] or reading.finish

    async def act_cancel(self, step: v.Cancel) -> None:
        task = self.jobs[step.job].task
        assert task is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def act_crash(self, step: v.Crash) -> None:
        self.node(step.who).kill()

    async def act_restart(self, step: v.Restart) -> None:
        await self.restart(step.who)

    async def restart(self, who: str, **env: str) -> None:
        """Start `who` again and wait until others can use it. Raises: ProcessFailed."""
        node, before = self.node(who), 0
        if who in self.providers:
            before = await self._offered_until(who)
        node.start(**env)
        await node.wait_ready()
        if who in self.clients:
            self._take_client(who, node)
            return

        async def known() -> bool:
            assert node.running, f"{who} died again"
            return await self._offered_until(who) > before

        await self._eventually(f"the client knows the new offer of {who}", known)

    async def _offered_until(self, who: str) -> int:
        """When the offer of `who` that the client knows expires; Unix seconds, 0 for none."""
        wallet = "0x" + self.wallets[who].address.hex()
        offers = (await self._call(v.CLIENT, "market"))["offers"]
        return max((int(offer["expires_at"]) for offer in offers if offer["provider"] == wallet), default=0)

    async def act_freeze(self, step: v.Freeze) -> None:
        self.node(step.who).signal(signal.SIGSTOP)

    async def act_thaw(self, step: v.Thaw) -> None:
        self.node(step.who).signal(signal.SIGCONT)

    async def act_chain_down(self, step: v.ChainDown) -> None:
        (self._anvil or self.cluster.anvil).stop()

    async def act_chain_up(self, step: v.ChainUp) -> None:
        port = int(self.cluster.anvil.rpc_url.rpartition(":")[2])
        self._anvil = Anvil(AnvilOptions(port=port, state=self.cluster.home / "anvil.json"))

    # --------------------------------------------------------------------------------------------- what is expected

    async def act_expect_tokens(self, step: v.ExpectTokens) -> None:
        async def seen() -> bool:
            return len(self.jobs[step.job].words) >= step.at_least

        await self._eventually(f"{step.at_least} tokens seen", seen)

    async def act_expect_running(self, step: v.ExpectRunning) -> None:
        async def running() -> bool:
            return bool((await self.status(step.who))["jobs_running"])

        await self._eventually(f"{step.who} has a job", running)
        await asyncio.sleep(step.for_s)  # time itself is what the step is about

    async def act_expect_vouched(self, step: v.ExpectVouched) -> None:
        wanted = self._vouched_before[step.who] + v.Work(step.tokens).at_least(_factor(step.who))

        async def held() -> bool:
            return int((await self.status(step.who))["vouched_wei"]) >= wanted

        await self._eventually(f"{step.who} holds vouchers for {step.tokens} tokens", held)

    async def _end(self, name: str) -> Reading:
        reading = self.jobs[name]
        assert reading.task is not None
        async with asyncio.timeout(PATIENCE_S):
            await reading.task
        return reading

    async def act_expect_finish(self, step: v.ExpectFinish) -> None:
        reading = await self._end(step.job)
        assert not reading.error, reading.error
        assert (reading.finish, len(reading.words)) == (step.reason, step.tokens)
        assert reading.usage["completion_tokens"] == step.tokens
        assert bool(int(reading.usage["tally"].get("refund_wei", 0))) == step.refunded

    async def act_expect_error(self, step: v.ExpectError) -> None:
        reading = await self._end(step.job)
        assert reading.error == step.code, f"{reading.error or 'it ended well'} after {len(reading.words)} tokens"
        assert len(reading.words) >= step.after

    async def act_expect_chain(self, step: v.ExpectChain) -> None:
        async def said() -> bool:
            return (await self.status(step.who))["chain"]["reachable"] is step.reachable

        await self._eventually(f"{step.who} says of the chain: reachable {step.reachable}", said)

    async def act_expect_evidence(self, step: v.ExpectEvidence) -> None:
        assert self.jobs[step.job].jobs  # looked at by `audit`, once the journal is free
        self.jobs[step.job].usage["evidence"] = True

    async def act_must_pay(self, step: v.MustPay) -> None:
        factor = _factor(step.to)
        low, high = (sum(getattr(work, end)(factor) for work in step.work) for end in ("at_least", "at_most"))
        before = self._claimed_before.get((step.to, step.by), 0)

        async def settled() -> bool:
            facts = await self.status(step.to)
            return facts["jobs_running"] == 0 and int(facts["unclaimed_wei"]) <= 0

        await self._eventually(f"{step.to} has settled", settled)
        paid = await self.claimed(step.to, step.by) - before
        assert low <= paid <= high, f"paid {paid} wei, not {low} to {high}"

    # ------------------------------------------------------------------------------------------------- when it is over

    async def audit(self) -> Audit:
        """Stop every node in order, then hold journals and chain against each other. Raises: AssertionError."""
        self.ended += [reading for reading in self.jobs.values() if reading.finish]
        await asyncio.gather(*(node.stop() for node in self.clients.values()))
        await asyncio.gather(*(node.stop() for node in self.providers.values()))
        providers = [(name, node.home, self.wallets[name].address) for name, node in self.providers.items()]
        audit = await audit_market(self.chain, providers, [(name, node.home) for name, node in self.clients.items()])
        assert not audit.broken, f"{audit.broken} (in {self.cluster.home})"
        store = SqlStore(self.clients[v.CLIENT].home / "journal.db")
        await store.open()
        try:
            for reading in self.ended:
                if reading.step.by == v.CLIENT:
                    await self._check_text(store, reading)
            assert not await store.inconsistencies()
        finally:
            await store.close()
        return audit

    async def _check_text(self, store: SqlStore, reading: Reading) -> None:
        """The text is what the first job's seed gives, whoever wrote it."""
        first = reading.jobs.partition(",")[0].removeprefix("0x")
        job = await store.job(JobId(bytes.fromhex(first)))
        assert job is not None
        start = len(reading.step.prompt)
        engine = EngineTwin()
        text = [f"t{engine.token(job.accept.seed, start + i)}" for i in range(len(reading.words))]
        assert reading.words == text, f"another text than the seed gives (in {self.cluster.home})"
        if reading.usage.get("evidence"):
            assert any([await store.get_value(f"evidence/{first}/{n}") for n in range(1, 6)])


def _factor(who: str) -> int:
    return v.DEARER if who == v.OTHER else 1
