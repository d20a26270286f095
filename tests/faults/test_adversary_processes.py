"""The adversaries as processes on one market: clients that do not pay, a provider that squats, beside honest ones.

What a rogue client says frame by frame is in test_rogue_client.py, on the twins; here each is a real gateway that
misbehaves in its way, and the books of everybody are held against the chain afterwards.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from devnet.adversaries.providers import VICTIM
from devnet.audit import audit_market
from devnet.cluster import MODEL_NAME, Cluster, ClusterOptions
from devnet.http_client import OpenAIClient, Reply, RequestFailed
from devnet.processes import NodeProcess
from incentives.ledger import Role
from node.chain.chain import Web3Chain
from node.store.store import SqlStore
from node.system import SystemClock
from protocol.units import INCREMENT_TOKENS, WEI_PER_TALLY, Address, JobId, Wei

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CLIENTS = ("stops-vouchers", "replays", "overdraws", "races-exit")
TOKENS = 3 * INCREMENT_TOKENS


async def ask(node: NodeProcess) -> tuple[Reply, str]:
    """One completion of three increments; what came, and how it failed."""
    reply, body = Reply(), {"model": MODEL_NAME, "prompt": "Define the word river.", "seed": 1}
    limits = {"max_tokens": TOKENS, "min_tokens": TOKENS}
    async with OpenAIClient(str(node.ready["url"]), str(node.ready["api_key"])) as client:
        try:
            async for _ in client.stream("/completions", {**body, **limits}, reply):
                pass
        except RequestFailed as exc:
            return reply, str(exc)
    return reply, ""


async def delivered(home: Path) -> dict[Address, tuple[int, int]]:
    """By client: output tokens of all its jobs that were receipted, and those of them that were vouched for."""
    store = SqlStore(home / "journal.db")
    await store.open()
    try:
        jobs: dict[JobId, tuple[int, int]] = {}
        clients: dict[JobId, Address] = {}
        for row in await store.receipts(role=Role.PROVIDER, limit=10_000):
            job_id = JobId(row.receipt.job_id)
            made, paid = jobs.get(job_id, (0, 0))
            tokens = row.receipt.completion_tokens
            vouched = tokens if row.voucher is not None or row.ack_signature else 0
            jobs[job_id], clients[job_id] = (max(made, tokens), max(paid, vouched)), Address(row.receipt.client)
    finally:
        await store.close()
    sums: dict[Address, tuple[int, int]] = {}
    for job_id, (made, paid) in jobs.items():
        before = sums.get(clients[job_id], (0, 0))
        sums[clients[job_id]] = before[0] + made, before[1] + paid
    return sums


async def session_of(home: Path) -> Address:
    """The session key that a client paid with."""
    store = SqlStore(home / "journal.db")
    await store.open()
    try:
        return (await store.jobs(Role.CLIENT))[0].request.client
    finally:
        await store.close()


async def test_clients_that_do_not_pay_get_an_increment_and_the_others_everything(tmp_path: Path) -> None:
    options = ClusterOptions(
        tmp_path / "market",
        providers=1,
        settle_interval="1s",
        client_config={"stall": "3s"},
        adversaries={f"client-{name}": name for name in CLIENTS},
    )
    async with Cluster(options) as cluster:
        names = [f"client-{name}" for name in CLIENTS]
        nodes = [await cluster.add_client(name, Wei(20 * WEI_PER_TALLY)) for name in names]
        ended = dict(zip(CLIENTS, await asyncio.gather(*(ask(node) for node in nodes)), strict=True))
        honest, failure = await ask(cluster.gateway)
        assert not failure and honest.usage["completion_tokens"] == TOKENS
        again = {name: await ask(node) for name, node in zip(CLIENTS[:3], nodes[:3], strict=True)}
        for node in (*nodes, cluster.gateway, *cluster.providers):
            await node.stop()
        sums = await delivered(cluster.providers[0].home)
        for name, node in zip(CLIENTS, nodes, strict=True):
            made, paid = sums[await session_of(node.home)]
            jobs = 1 + (name in again)
            assert made - paid <= jobs * INCREMENT_TOKENS, name
            if name != "races-exit":
                assert ended[name][1], f"{name} was served to the end"
        chain = Web3Chain(cluster.anvil.rpc_url, cluster.deployment, None, clock=SystemClock())
        await chain.start()
        try:
            provider, wallet = cluster.providers[0], cluster.wallets[0]
            clients = [(node.name, node.home) for node in (cluster.gateway, *nodes)]
            audit = await audit_market(chain, [(provider.name, provider.home, wallet.address)], clients)
        finally:
            await chain.stop()
        assert not audit.broken, audit.broken
        assert audit.lost_wei == 0 and audit.settled_wei > 0, "whoever races its exit is settled before it is out"


async def test_who_offers_in_another_name_is_bought_from_by_nobody(tmp_path: Path) -> None:
    squatted = "0x" + "ab" * 20
    options = ClusterOptions(
        tmp_path / "market", providers=2, adversaries={"provider-2": "squatter"}, env={VICTIM: squatted}
    )
    async with Cluster(options) as cluster:
        for _ in range(3):
            reply, failure = await ask(cluster.gateway)
            assert not failure, failure
            assert cluster.wallets[0].address.hex() in reply.provider.lower()
        log = cluster.gateway.log_file.read_text()
        assert squatted[2:] not in log or "not registered" in log


async def test_who_is_late_and_silent_loses_the_job_and_is_paid_for_nothing(tmp_path: Path) -> None:
    options = ClusterOptions(
        tmp_path / "market",
        providers=2,
        client_config={"stall": "2s"},
        each_config=({"completion_price": "1"}, {"completion_price": "3"}),
        adversaries={"provider-1": "late-and-silent"},
    )
    async with Cluster(options) as cluster:
        reply, failure = await ask(cluster.gateway)
        assert not failure and reply.usage["completion_tokens"] == TOKENS
        assert cluster.wallets[1].address.hex() in reply.provider.lower()
        for node in (cluster.gateway, *cluster.providers):
            await node.stop()
        assert not any(paid for _, paid in (await delivered(cluster.providers[0].home)).values())
        (served,) = (await delivered(cluster.providers[1].home)).values()
        assert 0 < served[0] == served[1] <= TOKENS
