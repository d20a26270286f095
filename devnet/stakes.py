"""What the Court took, read from the Registry's own log, and whether every TALLY there is still lies somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from devnet.audit import Audit
from node.chain.contracts import Contracts, checksum
from node.chain.deployment import Deployment
from node.chain.rpc import Rpc
from node.ports import Clock
from protocol.units import Address, Digest, Wei


@dataclass(frozen=True, slots=True)
class Slash:
    """One `Slashed` event. `fault`: the Court's id of what was punished. `taken`: wei, of which `bounty` not burned."""

    wallet: Address
    fault: Digest
    taken: Wei
    bounty: Wei
    transaction: Digest
    block: int


@dataclass(frozen=True, slots=True)
class Stake:
    """What a party put up and what is left of it, active and unbonding together, in wei."""

    name: str
    wallet: Address
    deposited: Wei
    held: Wei
    slashed: Wei

    def as_json(self, slashes: Sequence[Slash]) -> dict[str, Any]:
        """For `--json`, with the transactions that took it."""
        taken = ["0x" + slash.transaction.hex() for slash in slashes if slash.wallet == self.wallet and slash.taken]
        sums = {"deposited_wei": self.deposited, "held_wei": self.held, "slashed_wei": self.slashed}
        return {"name": self.name, "wallet": "0x" + self.wallet.hex(), **sums, "transactions": taken}


@dataclass(frozen=True, slots=True)
class Stakes:
    """Every party's stake, and every slash in order."""

    parties: tuple[Stake, ...]
    slashes: tuple[Slash, ...]


class StakeReader:
    """`async with StakeReader(rpc_url, deployment, clock) as reader`. Its reads raise ChainUnavailable, ChainError."""

    def __init__(self, rpc_url: str, deployment: Deployment, clock: Clock) -> None:
        self._deployment = deployment
        self._rpc = Rpc(rpc_url, clock)

    async def __aenter__(self) -> StakeReader:
        await self._rpc.start()
        self._contracts = Contracts(self._rpc.w3, self._deployment)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._rpc.stop()

    async def slashes(self) -> tuple[Slash, ...]:
        """Everything that was ever taken, in order."""
        return tuple(
            Slash(
                _bytes(log["args"]["wallet"]),
                Digest(bytes(log["args"]["faultId"])),
                Wei(log["args"]["taken"]),
                Wei(log["args"]["bounty"]),
                Digest(bytes(log["transactionHash"])),
                int(log["blockNumber"]),
            )
            for log in await self._logs("Slashed")
        )

    async def stakes(self, parties: Sequence[tuple[str, Address, Wei]]) -> Stakes:
        """`parties`: name, wallet, and what it staked."""
        slashes, out = await self.slashes(), []
        for name, wallet, deposited in parties:
            call = self._contracts.registry.functions.stakeOf(checksum(wallet))
            active, unbonding, _ = await self._rpc.read(lambda _, call=call: call.call())  # type: ignore[misc]
            slashed = sum(slash.taken for slash in slashes if slash.wallet == wallet)
            out.append(Stake(name, wallet, deposited, Wei(active + unbonding), Wei(slashed)))
        return Stakes(tuple(out), slashes)

    async def conserve(self, audit: Audit, stakes: Stakes, accounts: Sequence[Address]) -> None:
        """Add to `audit` what does not come out. `accounts`: everybody who may hold TALLY, contracts included."""
        for stake in stakes.parties:
            audit.check(
                f"{stake.name}: stake held and slashed against deposited", stake.held + stake.slashed, stake.deposited
            )
        token, registry = self._contracts.token.functions, self._deployment.registry
        bounties = sum(slash.bounty for slash in stakes.slashes)
        collected = sum(int(log["args"]["amount"]) for log in await self._logs("BountyCollected"))
        held = await self._balance(registry)
        staked = sum(stake.held for stake in stakes.parties)
        audit.check("TALLY held by the Registry against stakes and bounties", held, staked + bounties - collected)
        supply = int(await self._rpc.read(lambda _: token.totalSupply().call()))
        found = sum([await self._balance(account) for account in accounts])
        audit.check("TALLY that exists against what everybody holds", supply, found)

    async def _balance(self, account: Address) -> int:
        call = self._contracts.token.functions.balanceOf(checksum(account))
        return int(await self._rpc.read(lambda _: call.call()))

    async def _logs(self, name: str) -> list[Any]:
        event = getattr(self._contracts.registry.events, name)
        return list(await self._rpc.read(lambda _: event.get_logs(from_block=self._deployment.block)))


def _bytes(shown: str) -> Address:
    return Address(bytes.fromhex(shown.removeprefix("0x")))
