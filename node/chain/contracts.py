"""The contracts' interfaces: calls encoded, results, events and errors decoded. No network in here."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from contracts import SHIPPED, artifact
from contracts.codec import decode_claims, encode_vouchers
from incentives.ledger import ChannelKey
from node.chain.deployment import Deployment
from node.chain.errors import ContractReverted
from node.chain.rpc import CallReverted
from node.ports import ChainError
from protocol.eip712 import fields_of
from protocol.messages import Tariff
from protocol.units import Address, Digest, Wei

if TYPE_CHECKING:
    from web3 import AsyncWeb3
    from web3.contract import AsyncContract

CHANNEL_EVENTS: Final = ("ChannelOpened", "ToppedUp", "ExitRequested", "ExitCancelled", "Exited", "Settled")
"""Every Escrow event after which a channel's slot reads differently. All have the provider as first topic; all but
`Settled` the session key as second."""


@dataclass(frozen=True, slots=True)
class SettledLog:
    """A `Settled` event. `claims`: (session key, new claimed total), one per voucher that paid, in order."""

    paid: Wei
    fee: Wei
    claims: tuple[tuple[Address, Wei], ...]


class Contracts:
    """The deployment's contracts as web3 objects, and what a node needs of their encodings."""

    def __init__(self, w3: AsyncWeb3[Any], deployment: Deployment) -> None:
        self.deployment = deployment
        self.token = bound(w3, "TallyToken", deployment.token)
        self.escrow = bound(w3, "Escrow", deployment.escrow)
        self.registry = bound(w3, "Registry", deployment.registry)
        self.reservations = bound(w3, "Reservations", deployment.reservations)
        self._codec = w3.codec
        self._topics = {
            topic_of(entry): entry["name"]
            for entry in artifact("Escrow")["abi"]
            if entry["type"] == "event" and entry["name"] in CHANNEL_EVENTS
        }
        events = (entry for entry in artifact("Reservations")["abi"] if entry["type"] == "event")
        self._right_topics = {entry["name"]: topic_of(entry) for entry in events}

    def encode(self, contract: AsyncContract, function: str, *arguments: Any) -> bytes:
        """Calldata. Addresses among the arguments are 20 bytes."""
        shown = [checksum(a) if isinstance(a, bytes) and len(a) == 20 else a for a in arguments]
        return bytes.fromhex(contract.encode_abi(function, args=shown).removeprefix("0x"))

    def settle(self, provider: Address, vouchers: Iterable[tuple[Wei, bytes]]) -> bytes:
        """Calldata of Escrow.settle. `vouchers`: (cumulative, signature), each of packable form."""
        return self.encode(self.escrow, "settle", provider, encode_vouchers(vouchers))

    def log_tariff(self, tariff: Tariff, signature: bytes) -> bytes:
        """Calldata of Registry.logTariff."""
        values = (getattr(tariff, name) for name, _ in fields_of(Tariff))
        words = tuple(checksum(v) if isinstance(v, bytes) and len(v) == 20 else v for v in values)
        return self.encode(self.registry, "logTariff", words, signature)

    def slot_filter(self, provider: Address, first: int, last: int) -> dict[str, Any]:
        """The eth_getLogs query for every change of a slot of `provider` in blocks `first` to `last`."""
        return {
            "address": checksum(self.deployment.escrow),
            "topics": [["0x" + topic.hex() for topic in self._topics], "0x" + provider.rjust(32, b"\0").hex()],
            "fromBlock": first,
            "toBlock": last,
        }

    def right_filters(self, account: Address, first: int, last: int) -> tuple[dict[str, Any], ...]:
        """The eth_getLogs queries for every right that became `account`'s, or was sold by it, in these blocks.

        The id is the first topic of what they find.
        """
        party = "0x" + account.rjust(32, b"\0").hex()
        received = ["0x" + self._right_topics["Transferred"].hex(), None, None, party]
        sold = ["0x" + self._right_topics["Bought"].hex(), None, party]
        place = {"address": checksum(self.deployment.reservations), "fromBlock": first, "toBlock": last}
        return {**place, "topics": received}, {**place, "topics": sold}

    def bought_in(self, logs: Sequence[Mapping[str, Any]]) -> Digest:
        """Id of the right that a purchase's receipt tells of. Raises: ChainError when it tells of none."""
        for log in logs:
            ours = bytes.fromhex(log["address"].removeprefix("0x")) == self.deployment.reservations
            if ours and bytes(log["topics"][0]) == self._right_topics["Bought"]:
                return Digest(bytes(log["topics"][1]))
        raise ChainError("the purchase was mined, and its receipt names no right: `tally reservation list` finds it")

    def touched(self, log: Mapping[str, Any]) -> set[ChannelKey]:
        """The channels whose slot an Escrow event changed."""
        topics = [bytes(topic) for topic in log["topics"]]
        provider = Address(topics[1][-20:])
        if self._topics.get(topics[0]) == "Settled":
            return {ChannelKey(provider, client) for client, _ in self._settled(log).claims}
        return {ChannelKey(provider, Address(topics[2][-20:]))}

    def settled_in(self, logs: Sequence[Mapping[str, Any]]) -> SettledLog | None:
        """The `Settled` event among a receipt's logs; None when the batch paid nothing."""
        for log in logs:
            ours = bytes.fromhex(log["address"].removeprefix("0x")) == self.deployment.escrow
            if ours and self._topics.get(bytes(log["topics"][0])) == "Settled":
                return self._settled(log)
        return None

    def _settled(self, log: Mapping[str, Any]) -> SettledLog:
        paid, fee, claims = self._codec.decode(["uint256", "uint256", "uint256[]"], bytes(log["data"]))
        return SettledLog(Wei(paid), Wei(fee), tuple((Address(a), Wei(c)) for a, c in decode_claims(claims)))


@contextlib.contextmanager
def named_reverts(w3: AsyncWeb3[Any], action: str) -> Iterator[None]:
    """Within it, a contract's revert is raised as ContractReverted: the custom error's name and arguments."""
    from eth_abi.exceptions import DecodingError

    try:
        yield
    except CallReverted as reverted:
        entry = _errors().get(reverted.data[:4])
        if entry is None:
            raise ContractReverted(action, "Error", {"reason": reverted.message}) from reverted
        try:
            values = w3.codec.decode([i["type"] for i in entry["inputs"]], reverted.data[4:])
        except DecodingError as exc:
            raise ContractReverted(action, entry["name"], {"undecodable": reverted.data[4:]}) from exc
        named = zip((i["name"] for i in entry["inputs"]), values, strict=True)
        raise ContractReverted(action, entry["name"], {n: _plain(value) for n, value in named}) from reverted


def checksum(address: bytes) -> Any:
    """An address as web3 wants it."""
    from eth_utils.address import to_checksum_address

    return to_checksum_address(address)


def bound(w3: AsyncWeb3[Any], name: str, address: Address) -> AsyncContract:
    """A shipped contract at an address."""
    contract: AsyncContract = w3.eth.contract(address=checksum(address), abi=artifact(name)["abi"])
    return contract


@functools.cache
def _errors() -> dict[bytes, Any]:
    """Every custom error of the shipped contracts, by selector. All of them: one reverts with another's error."""
    entries = (entry for name in SHIPPED for entry in artifact(name)["abi"])
    return {_selector(entry): entry for entry in entries if entry["type"] == "error"}


def _selector(entry: Any) -> bytes:
    from eth_utils.abi import function_abi_to_4byte_selector

    as_function: Any = {**entry, "type": "function"}
    return function_abi_to_4byte_selector(as_function)


def topic_of(entry: Any) -> bytes:
    """The first topic of an event, from its ABI entry."""
    from eth_utils.abi import event_abi_to_log_topic

    return event_abi_to_log_topic(entry)


def _plain(value: object) -> object:
    """Addresses as bytes, as everywhere else of ours."""
    if isinstance(value, str) and len(value) == 42 and value.startswith("0x"):
        return bytes.fromhex(value[2:])
    return value
