"""A market of real processes with a Court: one provider of the demo model, a gateway, validators, and the cases."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from devnet.cases import Case, CourtWatch, open_court
from devnet.cluster import DEPLOY, MODEL_NAME, Cluster, ClusterOptions
from devnet.http_client import OpenAIClient, Reply
from devnet.processes import NodeProcess
from devnet.stakes import StakeReader, Stakes
from node.store.store import SqlStore
from node.system import SystemClock

SHORT_S = 10
"""Submit window where the provider withholds: somebody has to wait until it is over."""

SHORT = replace(DEPLOY, court=replace(DEPLOY.court, submit_window=SHORT_S, answer_window=2))

PATIENCE_S = 90.0
"""For one job's case to be over, on busy cores. Unit: s."""


class CourtStage:
    """`async with CourtStage(home, ...) as stage`. Keyword arguments are ClusterOptions' own."""

    def __init__(self, home: Path, providers: int = 1, validators: int = 3, **changes: Any) -> None:
        self.cluster = Cluster(ClusterOptions(home, providers, validators, **changes))
        self._stack = AsyncExitStack()
        self._jobs = 0
        self.closed: list[Case] = []

    async def __aenter__(self) -> CourtStage:
        await self._stack.enter_async_context(self.cluster)
        try:
            await self.cluster.validators_ready()
            at = self.cluster
            self._client = await self._stack.enter_async_context(OpenAIClient(at.url, at.api_key))
            self.court = await self._stack.enter_async_context(open_court(at.anvil.rpc_url, at.deployment))
        except BaseException:
            await self._stack.aclose()
            raise
        self.watch = CourtWatch(self.court, at.names, self.closed.append)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def job(self, tokens: int = 40) -> Reply:
        """One answered request, whose case will follow."""
        self._jobs += 1
        words = [{"role": "user", "content": f"Define the word river, number {self._jobs}."}]
        body = {"model": MODEL_NAME, "messages": words, "max_tokens": tokens, "temperature": 0.8}
        return await self._client.complete("/chat/completions", body)

    async def over(self) -> list[Case]:
        """Wait until every job's case is over; all of them, in order. Raises: AssertionError."""
        in_time = await self.watch.until_over(self._jobs, PATIENCE_S)
        assert in_time, f"{self.watch.standing()} (in {self.cluster.home})"
        return list(self.watch.cases.values())

    async def killed(self, node: NodeProcess) -> None:
        """Wait until a node that is armed with a crash point has died of it. Raises: AssertionError."""
        await node.wait_gone(PATIENCE_S)
        assert node.exit_status == -signal.SIGKILL, node.log_tail()

    async def stakes(self) -> Stakes:
        async with StakeReader(self.cluster.anvil.rpc_url, self.cluster.deployment, SystemClock()) as reader:
            return await reader.stakes(self.cluster.staked)

    async def verdicts(self, node: NodeProcess) -> int:
        """Stop a validator and count the verdicts in its journal, which must hold one per case and round."""
        await node.stop()
        store = SqlStore(node.home / "journal.db")
        await store.open()
        try:
            rows = await store.verdicts()
            assert not await store.inconsistencies()
        finally:
            await store.close()
        seats = {(row.record.verdict.case_id, row.record.verdict.round) for row in rows}
        assert len(seats) == len(rows)
        return len(rows)
