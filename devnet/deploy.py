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
from node.ports import ChainError, Clock, CourtRules
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, ZERO_ADDRESS, Address, Wei

_POLICY: Final = SendPolicy(poll_s=0.2)

_COURT_AFTER: Final = 2
"""Contracts created between the computation of the Court's address and the Court: Registry and Faults."""


COURT_RULES: Final = CourtRules(
    epoch_seconds=5,
    commit_window=120,
    submit_window=30,
    reveal_window=10,
    answer_window=8,
    committees=(3, 4, 5),
    validator_stake=Wei(100 * WEI_PER_TALLY),
    validator_penalty=Wei(20 * WEI_PER_TALLY),
    appeal_bond=Wei(10 * WEI_PER_TALLY),
)
"""A Court for one's own machine: a verdict within seconds, and a provider that restarts still delivers in time. A
public one needs hours, committees of 3, 7 and 21, and stakes that follow from incentives/exposure.py."""


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """Constructor arguments; the defaults suit a chain on one's own machine. All times in seconds, amounts in wei.

    `supply`: minted to the deployer. `minter`: zero for nobody. `unbond_delay` must be above the three windows
    together, or the Registry refuses to be deployed, and above the longest that `court` lets a case take, or the Court
    does. `period_seconds`: what capacity is sold ahead by. `court`, `forced_bps`: the Court's rules.
    """

    supply: int = 100_000_000 * WEI_PER_TALLY
    minter: Address = ZERO_ADDRESS
    exit_delay: int = 600
    min_stake: int = 100 * WEI_PER_TALLY
    unbond_delay: int = 1_200
    epoch_seconds: int = 60
    period_seconds: int = 60
    audit_window: int = 300
    dispute_window: int = 300
    verdict_window: int = 300
    court: CourtRules = COURT_RULES
    forced_bps: int = 0


async def deploy(rpc_url: str, deployer: Signer, clock: Clock, options: DeployOptions | None = None) -> Deployment:
    """Deploy token, escrow, registry, judge of faults, court and reservations, in that order, from `deployer`, who
    pays and holds the supply.

    Registry and Court name each other for ever, so the Court's address is computed before either is there: nobody else
    may send from `deployer` meanwhile. Raises: ChainUnavailable, ChainError.
    """
    o = options or DeployOptions()
    async with _connected(rpc_url, deployer, clock) as (rpc, sender, chain_id):
        block = int(await rpc.read(lambda w3: w3.eth.block_number))
        token = await _create(rpc, sender, "TallyToken", o.minter, deployer.address, o.supply)
        escrow = await _create(rpc, sender, "Escrow", token, o.exit_delay)
        court = await _address_of_next(rpc, deployer.address, _COURT_AFTER)
        windows = (o.audit_window, o.dispute_window, o.verdict_window)
        registry = await _create(
            rpc, sender, "Registry", token, escrow, court, o.min_stake, o.unbond_delay, o.epoch_seconds, *windows
        )
        faults = await _create(rpc, sender, "Faults", registry, escrow, court)
        deployed = await _create(rpc, sender, "Court", registry, escrow, token, faults, _rules_words(o))
        if deployed != court:
            raise ChainError(f"the Court came to {deployed.hex()}, the Registry obeys {court.hex()}: deploy again")
        reservations = await _create(rpc, sender, "Reservations", token, o.period_seconds)
    return Deployment(chain_id, token, escrow, registry, reservations, court, faults, block + 1)


def _rules_words(options: DeployOptions) -> tuple[Any, ...]:
    """ICourt.Rules in the order of its fields."""
    r = options.court
    windows = (r.epoch_seconds, r.commit_window, r.submit_window, r.reveal_window, r.answer_window)
    return (*windows, r.committees, options.forced_bps, r.validator_stake, r.validator_penalty, r.appeal_bond)


async def _address_of_next(rpc: Rpc, deployer: Address, after: int) -> Address:
    """Where the contract comes to that `deployer` creates after `after` more transactions (EIP-161: by nonce)."""
    from web3.types import Nonce
    from web3.utils.address import get_create_address

    from node.chain.contracts import checksum

    nonce = int(await rpc.read(lambda w3: w3.eth.get_transaction_count(checksum(deployer))))
    created = get_create_address(checksum(deployer), Nonce(nonce + after))
    return Address(bytes.fromhex(created.removeprefix("0x")))


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
