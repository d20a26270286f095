"""A local chain with the shipped artifacts deployed on it, for tests that need real transactions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from web3 import HTTPProvider, Web3
from web3.contract.contract import Contract, ContractFunction
from web3.types import TxReceipt

from contracts import artifact
from devnet.anvil import Anvil
from protocol.eip712 import Domain
from protocol.units import Address

WEI = 10**18
EXIT_DELAY = 3600
PERIOD = 3600
SUPPLY = 1_000_000 * WEI


@dataclass(frozen=True, slots=True)
class Chain:
    """Token, Escrow and Reservations on a running Anvil; account 0 deployed them and holds the supply."""

    web3: Web3
    token: Contract
    escrow: Contract
    reservations: Contract

    @property
    def domain(self) -> Domain:
        return Domain(self.web3.eth.chain_id, Address(bytes.fromhex(self.escrow.address[2:])))

    def account(self, index: int) -> str:
        return str(self.web3.eth.accounts[index])

    def send(self, call: ContractFunction, sender: int = 0) -> TxReceipt:
        """Run `call` as a transaction and return its receipt; asserts that it did not revert."""
        return wait(self.web3, call.transact({"from": self.web3.eth.accounts[sender]}))


def wait(web3: Web3, transaction: Any) -> TxReceipt:
    receipt = web3.eth.wait_for_transaction_receipt(transaction, timeout=30, poll_latency=0.005)
    assert receipt["status"] == 1
    return receipt


def deploy(web3: Web3, name: str, *arguments: Any) -> Contract:
    """Deploy the shipped artifact `name` from account 0."""
    shipped = artifact(name)
    factory = web3.eth.contract(abi=shipped["abi"], bytecode=shipped["bytecode"])
    receipt = wait(web3, factory.constructor(*arguments).transact({"from": web3.eth.accounts[0]}))
    return factory(address=receipt["contractAddress"])


def deploy_all(web3: Web3) -> Chain:
    """The contracts that hold clients' money."""
    owner = web3.eth.accounts[0]
    token = deploy(web3, "TallyToken", owner, owner, SUPPLY)
    escrow = deploy(web3, "Escrow", token.address, EXIT_DELAY)
    return Chain(web3, token, escrow, deploy(web3, "Reservations", token.address, PERIOD))


@pytest.fixture(scope="module")
def chain() -> Iterator[Chain]:
    with Anvil() as anvil:
        yield deploy_all(Web3(HTTPProvider(anvil.rpc_url)))
