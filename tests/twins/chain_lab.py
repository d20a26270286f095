"""One bench for two chains: the twin in memory and Web3Chain on Anvil, with the same levers.

What a test says with a `ChainLab` must hold on both; that is what makes the twin trustworthy elsewhere.
"""

from __future__ import annotations

from typing import Any, Protocol

from eth_hash.auto import keccak

from devnet.anvil import Anvil
from devnet.deploy import DeployOptions, fund
from node.chain import ChainOptions, Deployment, RpcLimits, Web3Chain
from node.chain.court import Web3Court
from node.chain.rpc import Rpc
from node.ports import Chain, Court, CourtRules, Mined
from protocol.eip712 import Domain
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, Address, Digest, Wei
from tests.twins.memory_chain import MemoryChain
from tests.twins.memory_court import RULES, CourtWorld, MemoryCourt
from tests.twins.memory_ledger import MemoryLedgerChain
from tests.twins.wall_clock import WallClock

RICH_TALLY = 1_000 * WEI_PER_TALLY
RICH_COIN = 10**18

LAB_OPTIONS = DeployOptions(exit_delay=600, min_stake=100 * WEI_PER_TALLY, epoch_seconds=60)


class Node(Chain, Protocol):
    """The port, and what both implementations offer beyond it."""

    async def transfer(self, to: Address, amount: Wei) -> Mined: ...


class ChainLab(Protocol):
    """A chain with levers. Amounts in wei."""

    @property
    def domain(self) -> Domain: ...

    async def account(self, tally: int = RICH_TALLY, coin: int = RICH_COIN) -> Signer:
        """A new wallet with money."""
        ...

    async def node(self, wallet: Signer | None, confirmations: int = 1, timeout_s: float = 10.0) -> Node:
        """A started node, stopped with the lab. `timeout_s`: what it gives the RPC for an answer."""
        ...

    async def mine(self, blocks: int = 1) -> None: ...

    async def advance(self, seconds: int) -> None:
        """Let chain time pass."""
        ...

    async def automine(self, on: bool) -> None: ...

    async def drop(self, transaction: Digest) -> None:
        """The pool forgets it."""
        ...

    async def reorg(self, depth: int) -> None:
        """The last blocks are replaced by empty ones; what they held is gone."""
        ...

    async def freeze(self) -> None:
        """No RPC answers until `thaw`."""
        ...

    async def thaw(self) -> None: ...

    async def escrow_holds(self) -> int:
        """TALLY the Escrow has."""
        ...

    async def fees_pending(self) -> int:
        """TALLY of it that waits to be burned."""
        ...


class CourtLab(ChainLab, Protocol):
    """A chain whose deployment has a Court."""

    def court(self, node: Node) -> Court:
        """The Court, acting for the wallet of one of this lab's nodes."""
        ...


class MemoryLab:
    """The twin. `rules`: of its Court."""

    def __init__(self, rules: CourtRules = RULES) -> None:
        o = LAB_OPTIONS
        self.world = MemoryLedgerChain(
            epoch_seconds=o.epoch_seconds,
            exit_delay=o.exit_delay,
            min_stake=o.min_stake,
            unbond_delay=o.unbond_delay,
        )
        self.court_world = CourtWorld(self.world, rules)
        self._accounts = 0

    def court(self, node: Node) -> Court:
        assert isinstance(node, MemoryChain)
        return MemoryCourt(self.court_world, node)

    @property
    def domain(self) -> Domain:
        return self.world.domain

    async def account(self, tally: int = RICH_TALLY, coin: int = RICH_COIN) -> Signer:
        self._accounts += 1
        signer = secret_of(self._accounts)
        self.world.fund(signer.address, tally, coin)
        return signer

    async def node(self, wallet: Signer | None, confirmations: int = 1, timeout_s: float = 10.0) -> Node:
        node = MemoryChain(self.world, wallet, confirmations)
        await node.start()
        return node

    async def mine(self, blocks: int = 1) -> None:
        self.world.mine(blocks)

    async def advance(self, seconds: int) -> None:
        self.world.advance(seconds)

    async def automine(self, on: bool) -> None:
        self.world.automine = on

    async def drop(self, transaction: Digest) -> None:
        self.world.drop(transaction)

    async def reorg(self, depth: int) -> None:
        self.world.reorg(depth)

    async def freeze(self) -> None:
        self.world.down = True

    async def thaw(self) -> None:
        self.world.down = False

    async def escrow_holds(self) -> int:
        return self.world.head.state.escrow

    async def fees_pending(self) -> int:
        return self.world.head.state.fees

    async def close(self) -> None:
        pass


class _ChainTime(WallClock):
    """A wall clock that is never ahead of a chain whose time a test moves."""

    def now_ms(self) -> int:
        return 0


class AnvilLab:
    """Web3Chain on an Anvil that carries `deployment`. `close` takes back all that was done."""

    def __init__(self, anvil: Anvil, deployment: Deployment) -> None:
        self.anvil, self.deployment = anvil, deployment
        self.clock = WallClock()
        self.rpc = Rpc(anvil.rpc_url, self.clock, RpcLimits(timeout_s=5.0, attempts=2, backoff_s=0.05))
        self._nodes: list[Web3Chain] = []
        self._accounts = 0
        self._snapshot = ""

    def court(self, node: Node) -> Court:
        assert isinstance(node, Web3Chain)
        return Web3Court(node, _ChainTime())

    async def open(self) -> AnvilLab:
        await self.rpc.start()
        self._snapshot = await self.ask("evm_snapshot")
        return self

    async def close(self) -> None:
        for node in self._nodes:
            await node.stop()
        await self.automine(True)
        await self.ask("evm_revert", self._snapshot)
        await self.rpc.stop()

    async def ask(self, method: Any, *params: Any) -> Any:
        """Raw JSON-RPC. Raises: AssertionError with the node's error."""
        response = await self.rpc.once(lambda w3: w3.provider.make_request(method, list(params)))
        assert "error" not in response, response
        return response["result"]

    @property
    def domain(self) -> Domain:
        return self.deployment.domain

    async def account(self, tally: int = RICH_TALLY, coin: int = RICH_COIN) -> Signer:
        self._accounts += 1
        signer = secret_of(self._accounts)
        await self.ask("anvil_setBalance", "0x" + signer.address.hex(), hex(coin))
        bank = self.anvil.accounts[0]
        await fund(self.anvil.rpc_url, self.deployment, bank, self.clock, [signer.address], Wei(tally), 0)
        return signer

    async def node(self, wallet: Signer | None, confirmations: int = 1, timeout_s: float = 10.0) -> Web3Chain:
        limits = RpcLimits(timeout_s=timeout_s)
        return await self.node_with(wallet, ChainOptions(confirmations, poll_s=0.05, deadline_s=20, rpc=limits))

    async def node_with(self, wallet: Signer | None, options: ChainOptions, rpc_url: str | None = None) -> Web3Chain:
        """A node with other patience."""
        node = Web3Chain(rpc_url or self.anvil.rpc_url, self.deployment, wallet, clock=self.clock, options=options)
        await node.start()
        self._nodes.append(node)
        return node

    async def mine(self, blocks: int = 1) -> None:
        await self.ask("anvil_mine", hex(blocks))

    async def advance(self, seconds: int) -> None:
        await self.ask("evm_increaseTime", hex(seconds))
        await self.mine()

    async def automine(self, on: bool) -> None:
        await self.ask("evm_setAutomine", on)

    async def drop(self, transaction: Digest) -> None:
        await self.ask("anvil_dropTransaction", "0x" + transaction.hex())

    async def reorg(self, depth: int) -> None:
        await self.ask("anvil_reorg", depth, [])

    async def freeze(self) -> None:
        self.anvil.freeze()

    async def thaw(self) -> None:
        self.anvil.thaw()

    async def escrow_holds(self) -> int:
        data = "0x70a08231" + self.deployment.escrow.rjust(32, b"\0").hex()
        return int(await self.ask("eth_call", {"to": "0x" + self.deployment.token.hex(), "data": data}, "latest"), 16)

    async def fees_pending(self) -> int:
        data = "0x" + keccak(b"fees()")[:4].hex()
        words = await self.ask("eth_call", {"to": "0x" + self.deployment.escrow.hex(), "data": data}, "latest")
        return int(words[2:66], 16)


def secret_of(number: int) -> Signer:
    """The lab's account number so-and-so: a test key."""
    return Signer.from_secret(keccak(b"tallystick lab account %d" % number))


__all__ = ["AnvilLab", "ChainLab", "CourtLab", "MemoryLab", "Node", "secret_of"]
