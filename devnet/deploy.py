"""Put the contracts on a chain and hand out test money."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from contracts import artifact
from node.chain.deployment import Deployment
from node.chain.rpc import Rpc
from node.chain.sender import Sender, SendPolicy
from node.chain.transactions import Call
from node.ports import Clock
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, ZERO_ADDRESS, Address, Wei

_POLICY: Final = SendPolicy(poll_s=0.2)


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """Constructor arguments; the defaults suit a chain on one's own machine. All times in seconds, amounts in wei.

    `supply`: minted to the deployer. `minter`, `court`: zero for nobody. `unbond_delay` must be above the three
    windows together, or the Registry refuses to be deployed. `period_seconds`: what capacity is sold ahead by.
    """

    supply: int = 100_000_000 * WEI_PER_TALLY
    minter: Address = ZERO_ADDRESS
    court: Address = ZERO_ADDRESS
    exit_delay: int = 600
    min_stake: int = 100 * WEI_PER_TALLY
    unbond_delay: int = 1_200
    epoch_seconds: int = 60
    period_seconds: int = 60
    audit_window: int = 300
    dispute_window: int = 300
    verdict_window: int = 300


async def deploy(rpc_url: str, deployer: Signer, clock: Clock, options: DeployOptions | None = None) -> Deployment:
    """Deploy token, escrow, registry and reservations, in that order, from `deployer`, who pays and holds the supply.

    Raises: ChainUnavailable, ChainError.
    """
    o = options or DeployOptions()
    async with _connected(rpc_url, deployer, clock) as (rpc, sender, chain_id):
        block = int(await rpc.read(lambda w3: w3.eth.block_number))
        token = await _create(rpc, sender, "TallyToken", o.minter, deployer.address, o.supply)
        escrow = await _create(rpc, sender, "Escrow", token, o.exit_delay)
        windows = (o.audit_window, o.dispute_window, o.verdict_window)
        registry = await _create(
            rpc, sender, "Registry", token, escrow, o.court, o.min_stake, o.unbond_delay, o.epoch_seconds, *windows
        )
        reservations = await _create(rpc, sender, "Reservations", token, o.period_seconds)
    return Deployment(chain_id, token, escrow, registry, reservations, block + 1)


async def fund(
    rpc_url: str,
    deployment: Deployment,
    payer: Signer,
    clock: Clock,
    accounts: Sequence[Address],
    tally: Wei,
    coin: int,
) -> None:
    """Send each account `tally` wei of TALLY and `coin` wei of the chain's coin.

    Raises: ChainUnavailable, ChainError.
    """
    from node.chain.contracts import Contracts, named_reverts

    async with _connected(rpc_url, payer, clock) as (rpc, sender, _):
        contracts = Contracts(rpc.w3, deployment)
        for account in accounts:
            if coin:
                await sender.send(Call("send coin", account, value=coin))
            if tally:
                data = contracts.encode(contracts.token, "transfer", account, tally)
                with named_reverts(rpc.w3, "transfer"):
                    await sender.send(Call("transfer", deployment.token, data))


@contextlib.asynccontextmanager
async def _connected(rpc_url: str, wallet: Signer, clock: Clock) -> AsyncIterator[tuple[Rpc, Sender, int]]:
    rpc = Rpc(rpc_url, clock)
    await rpc.start()
    try:
        chain_id = int(await rpc.read(lambda w3: w3.eth.chain_id))
        yield rpc, Sender(rpc, wallet, chain_id, _POLICY), chain_id
    finally:
        await rpc.stop()


async def _create(rpc: Rpc, sender: Sender, name: str, *arguments: Any) -> Address:
    """Deploy one contract; addresses among the arguments are 20 bytes."""
    from node.chain.contracts import checksum, named_reverts

    loaded = artifact(name)
    factory = rpc.w3.eth.contract(abi=loaded["abi"], bytecode=loaded["bytecode"])
    shown = [checksum(a) if isinstance(a, bytes) else a for a in arguments]
    data = bytes.fromhex(factory.constructor(*shown).data_in_transaction.removeprefix("0x"))
    action = f"deploy {name}"
    with named_reverts(rpc.w3, action):
        receipt = await sender.send(Call(action, None, data))
    return Address(bytes.fromhex(receipt["contractAddress"].removeprefix("0x")))
