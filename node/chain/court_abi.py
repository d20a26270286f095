"""The Court contract's interface: calls encoded, views, events and verdicts decoded. No network in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from contracts import artifact
from node.chain.contracts import Contracts, bound, checksum, topic_of
from node.ports import CaseState, CommitmentRecord, CourtRules
from protocol.eip712 import camel, fields_of
from protocol.messages import Verdict
from protocol.units import ZERO_ADDRESS, ZERO_DIGEST, Address, AuditOutcome, Digest, Wei


class SeatStatus(IntEnum):
    """What a member has done (contracts/src/ICourt.sol)."""

    EMPTY = 0
    SUBMITTED = 1
    REVEALED = 2
    REMOVED = 3
    CREDITED = 4


@dataclass(frozen=True, slots=True)
class CaseWords:
    """What `caseOf` says."""

    state: CaseState
    round: int
    until: int
    outcome: AuditOutcome
    was_forced: bool
    evidence: int
    slashed: Wei


@dataclass(frozen=True, slots=True)
class SeatWords:
    """What `seatsOf` says of one seat. `submitted`: zero once it was revealed; the verdict is then in the log."""

    validator: Address
    status: SeatStatus
    submitted: Digest

    @property
    def revealed(self) -> bool:
        return self.status in (SeatStatus.REVEALED, SeatStatus.CREDITED)

    @property
    def credited(self) -> bool:
        return self.status is SeatStatus.CREDITED


class CourtAbi:
    """The Court of a deployment, bound to a connection's `contracts`."""

    def __init__(self, contracts: Contracts) -> None:
        self.contracts = contracts
        self.address = contracts.deployment.court
        self.first_block = contracts.deployment.block
        self._court = bound(contracts.token.w3, "Court", self.address)
        entries = [entry for entry in artifact("Court")["abi"] if entry["type"] == "event"]
        self._names = {topic_of(entry): entry["name"] for entry in entries}
        self._topics = {name: topic for topic, name in self._names.items()}

    def encode(self, function: str, *arguments: Any) -> bytes:
        """Calldata. Addresses among the arguments are 20 bytes; documents are tuples (court.words)."""
        return self.contracts.encode(self._court, function, *arguments)

    def call(self, function: str, *arguments: Any) -> Any:
        """A view's call, to be made at a block."""
        shown = [checksum(a) if isinstance(a, bytes) and len(a) == 20 else a for a in arguments]
        return self._court.functions[function](*shown)

    # ---------------------------------------------------------------------------------------------------- results

    @staticmethod
    def rules(raw: Any) -> CourtRules:
        """The constants of `rules`."""
        values = _by_name("rules", raw)
        first, second, third = (int(size) for size in values["committees"])
        return CourtRules(
            epoch_seconds=int(values["epochSeconds"]),
            commit_window=int(values["commitWindow"]),
            submit_window=int(values["submitWindow"]),
            reveal_window=int(values["revealWindow"]),
            answer_window=int(values["answerWindow"]),
            committees=(first, second, third),
            validator_stake=Wei(values["validatorStake"]),
            validator_penalty=Wei(values["validatorPenalty"]),
            appeal_bond=Wei(values["appealBond"]),
            forced_bps=int(values["forcedBps"]),
        )

    @staticmethod
    def commitment(key: Digest, raw: Any) -> CommitmentRecord | None:
        """The commitment of `commitments`, None when there is none."""
        values = _by_name("commitments", raw)
        provider = _plain(values["provider"])
        if provider == ZERO_ADDRESS:
            return None
        return CommitmentRecord(
            key,
            Address(provider),
            Digest(values["profileId"]),
            int(values["epoch"]),
            Digest(values["root"]),
            int(values["count"]),
            Wei(values["total"]),
            Digest(values["lot"]),
            int(values["blockNumber"]),
            Digest(values["beacon"]),
            int(values["earlier"]),
        )

    @staticmethod
    def case(raw: Any) -> CaseWords:
        """The case of `caseOf`."""
        values = _by_name("caseOf", raw)
        return CaseWords(
            CaseState(values["state"]),
            int(values["round"]),
            int(values["until"]),
            AuditOutcome(values["outcome"]),
            bool(values["wasForced"]),
            int(values["evidence"]),
            Wei(values["slashed"]),
        )

    @staticmethod
    def seats(raw: Any) -> list[SeatWords]:
        """The seats of `seatsOf`."""
        out = []
        for row in raw:
            values = _by_name("seatsOf", row)
            status = SeatStatus(values["status"])
            submitted = Digest(values["word"]) if status is SeatStatus.SUBMITTED else ZERO_DIGEST
            out.append(SeatWords(Address(_plain(values["validator"])), status, submitted))
        return out

    # ------------------------------------------------------------------------------------------------------ events

    def filter(self, first: int, last: int) -> tuple[dict[str, Any], ...]:
        """The eth_getLogs query for everything that the Court logged in these blocks."""
        return ({"address": checksum(self.address), "fromBlock": first, "toBlock": last},)

    def reveals(self, case_id: Digest, first: int, last: int) -> tuple[dict[str, Any], ...]:
        """The query for the verdicts of a case."""
        topics = ["0x" + self._topics["Revealed"].hex(), "0x" + case_id.hex()]
        return ({**self.filter(first, last)[0], "topics": topics},)

    def event(self, log: Mapping[str, Any]) -> tuple[int, str, dict[str, int | bytes]]:
        """(block, name, arguments by their Solidity name); documents inside are spread out, lists joined."""
        name = self._names[bytes(log["topics"][0])]
        arguments = self._court.events[name]().process_log(log)["args"]
        out: dict[str, int | bytes] = {}
        for key, value in dict(arguments).items():
            if isinstance(value, Mapping):
                out |= {inner: _plain(item) for inner, item in value.items()}
            elif isinstance(value, list | tuple):
                out[key] = b"".join(_plain(item) for item in value)
            else:
                out[key] = _plain(value)
        return int(log["blockNumber"]), name, out

    def verdict(self, log: Mapping[str, Any]) -> Verdict:
        """The document that a `Revealed` event holds."""
        _, _, values = self.event(log)
        return Verdict(**{name: values[camel(name)] for name, _ in fields_of(Verdict)})  # type: ignore[arg-type]


def _by_name(function: str, raw: Any) -> dict[str, Any]:
    """A returned struct's fields by name, whichever of its forms web3 chose."""
    if isinstance(raw, Mapping):
        return dict(raw)
    [entry] = [e for e in artifact("Court")["abi"] if e["type"] == "function" and e["name"] == function]
    names = [component["name"] for component in entry["outputs"][0]["components"]]
    return dict(zip(names, raw, strict=True))


def _plain(value: Any) -> Any:
    """Addresses and words as bytes, numbers as int."""
    if isinstance(value, str) and value.startswith("0x"):
        return bytes.fromhex(value[2:])
    return bytes(value) if isinstance(value, bytes | bytearray) else int(value)
