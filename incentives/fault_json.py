"""Fault proofs and commitments as JSON texts that travel, one spelling per value (as protocol/bundle_json.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from incentives.faults import MOST_BETWEEN, Fault, Placed, Proof, SignedReceipt, SignedRoot, SignedTariff
from protocol.bundle_json import MalformedBundle, Node, domain_json, parse, signed_json
from protocol.eip712 import Domain
from protocol.merkle import Entry, SumNode
from protocol.messages import Commitment, Tariff, WorkReceipt
from protocol.signing import verify
from protocol.units import Address, Digest, JobId, Wei

FORMAT: Final = "tallystick-fault/2"

MOST_SIBLINGS: Final = 32
"""Siblings of one entry's proof. A commitment counts in 32 bits, so no tree is deeper."""


def encode(proof: Proof) -> str:
    """The proof as JSON, ending in a newline."""
    tree = {
        "format": FORMAT,
        "fault": proof.fault.value,
        "domain": domain_json(proof.domain),
        "node_key": "0x" + proof.node_key.hex(),
        "tariffs": [signed_json(item.tariff, item.signature) for item in proof.tariffs],
        "receipts": [signed_json(item.receipt, item.signature) for item in proof.receipts],
        "between": ["0x" + block.hex() for block in proof.between],
        "roots": [signed_json(item.commitment, item.signature) for item in proof.roots],
        "placed": [_placed_json(item) for item in proof.placed],
        "epoch_seconds": proof.epoch_s,
    }
    return json.dumps(tree, indent=1) + "\n"


def decode(text: str) -> Proof:
    """The inverse of `encode`; every field must be there, of its type, and nothing else. Raises: MalformedBundle."""
    names = ("format", "fault", "domain", "node_key", "tariffs", "receipts", "between", "roots", "placed")
    top = parse(text).object(*names, "epoch_seconds")
    if top["format"].value != FORMAT:
        raise MalformedBundle("format", f"is {top['format'].value!r}, expected {FORMAT!r}")
    kinds = {fault.value: fault for fault in Fault}
    named = top["fault"].value
    if not isinstance(named, str) or named not in kinds:
        raise top["fault"].fail(f"must be one of {', '.join(kinds)}")
    between = top["between"].items()
    if len(between) > MOST_BETWEEN:
        raise top["between"].fail(f"must have at most {MOST_BETWEEN} digests")
    return Proof(
        top["domain"].domain(),
        Address(top["node_key"].hexadecimal(20)),
        kinds[named],
        tuple(SignedTariff(*item.signed(Tariff)) for item in top["tariffs"].items()),
        tuple(SignedReceipt(*item.signed(WorkReceipt)) for item in top["receipts"].items()),
        tuple(Digest(item.hexadecimal(32)) for item in between),
        tuple(SignedRoot(*item.signed(Commitment)) for item in top["roots"].items()),
        tuple(_placed(item) for item in top["placed"].items()),
        top["epoch_seconds"].number(32),
    )


def _placed_json(item: Placed) -> dict[str, object]:
    return {
        "job_id": "0x" + item.entry.job_id.hex(),
        "receipt": "0x" + item.entry.receipt.hex(),
        "amount": str(item.entry.amount),
        "index": item.index,
        "siblings": [{"hash": "0x" + node.hash.hex(), "total": str(node.total)} for node in item.siblings],
    }


def _placed(node: Node) -> Placed:
    """Raises: MalformedBundle."""
    parts = node.object("job_id", "receipt", "amount", "index", "siblings")
    siblings = parts["siblings"].items()
    if len(siblings) > MOST_SIBLINGS:
        raise parts["siblings"].fail(f"must have at most {MOST_SIBLINGS} nodes")
    entry = Entry(
        JobId(parts["job_id"].hexadecimal(32)),
        Digest(parts["receipt"].hexadecimal(32)),
        Wei(parts["amount"].decimal(96)),
    )
    pairs = [item.object("hash", "total") for item in siblings]
    nodes = (SumNode(Digest(pair["hash"].hexadecimal(32)), Wei(pair["total"].decimal(96))) for pair in pairs)
    return Placed(entry, parts["index"].number(32), tuple(nodes))


# --------------------------------------------------------------------------------------------------------- commitments

COMMITMENT_FORMAT: Final = "tallystick-commitment/2"


@dataclass(frozen=True, slots=True)
class SignedCommitment:
    """An epoch's committed root as its provider signed it. `epoch_s`: seconds of one epoch."""

    domain: Domain
    node_key: Address
    epoch_s: int
    commitment: Commitment
    signature: bytes


def encode_commitment(signed: SignedCommitment) -> str:
    """As JSON, ending in a newline."""
    tree = {
        "format": COMMITMENT_FORMAT,
        "domain": domain_json(signed.domain),
        "node_key": "0x" + signed.node_key.hex(),
        "epoch_seconds": signed.epoch_s,
        "commitment": signed_json(signed.commitment, signed.signature),
    }
    return json.dumps(tree, indent=1) + "\n"


def decode_commitment(text: str) -> SignedCommitment:
    """Every field must be there, of its type; the signature is checked. Raises: MalformedBundle, BadSignature."""
    top = parse(text).object("format", "domain", "node_key", "epoch_seconds", "commitment")
    if top["format"].value != COMMITMENT_FORMAT:
        raise MalformedBundle("format", f"is {top['format'].value!r}, expected {COMMITMENT_FORMAT!r}")
    epoch_s = top["epoch_seconds"].number(32)
    if epoch_s == 0:
        raise top["epoch_seconds"].fail("must be above zero")
    signed = SignedCommitment(
        top["domain"].domain(),
        Address(top["node_key"].hexadecimal(20)),
        epoch_s,
        *top["commitment"].signed(Commitment),
    )
    verify(signed.domain, signed.commitment, signed.signature, signed.node_key)
    return signed
