"""What auditing cost beside what was audited: seconds that models computed, as the nodes themselves count them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from devnet.processes import NodeProcess
from node.gateway.control import ControlClient


async def computed_s(nodes: Iterable[NodeProcess], figure: str) -> float:
    """The sum of a figure of running nodes' status: `busy_s` of providers, `replay_s` of validators. Unit: s.

    Both are seconds on the clock in which weights were multiplied, since the process began. Raises: ControlUnavailable.
    """
    clients = [ControlClient(node.home / "control.sock") for node in nodes]
    answers = await asyncio.gather(*(asyncio.to_thread(client.call_now, "status", 20.0) for client in clients))
    return sum(float(answer[figure]) for answer in answers)
