"""Foreign libraries leave the process as it was: a stranger's deep document is an error, not the end of the node."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import json, sys
before = sys.getrecursionlimit()
from pathlib import Path
from node.keys import load_or_create
import asyncio, tempfile
from node.chain.chain import Web3Chain
from node.chain.deployment import Deployment
from node.system import SystemClock

with tempfile.TemporaryDirectory() as home:
    wallet = load_or_create(Path(home) / "keys", "wallet", "password", scrypt_n=1024)

async def connect():
    nowhere = Deployment(1, *(bytes([n]) * 20 for n in range(6)), 0)
    chain = Web3Chain("http://127.0.0.1:1", nowhere, wallet, clock=SystemClock())
    try:
        async with asyncio.timeout(2):
            await chain.start()
    except Exception:
        pass

asyncio.run(connect())
assert "web3" in sys.modules and "eth_account" in sys.modules
assert sys.getrecursionlimit() == before, sys.getrecursionlimit()
try:
    json.loads("[" * 1_000_000)
except RecursionError:
    print("refused")
"""


def test_the_recursion_limit_survives_web3_and_eth_account() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "refused"), done.stderr[-2000:]
