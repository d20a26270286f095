"""Fault proofs and commitments as JSON texts that travel, one spelling per value (as protocol/bundle_json.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from incentives.faults import MOST_BETWEEN, Fault, Proof, SignedReceipt, SignedTariff
from protocol.bundle_json import MalformedBundle, domain_json, parse, signed_json
from protocol.eip712 import Domain
from protocol.messages import Commitment, Tariff, WorkReceipt
from protocol.signing import verify
from protocol.units import Address, Digest

FORMAT: Final = "tallystick-fault/1"


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
    }
    return json.dumps(tree, indent=1) + "\n"


def decode(text: str) -> Proof:
    """The inverse of `encode`; every field must be there, of its type, and nothing else. Raises: MalformedBundle."""
    top = parse(text).object("format", "fault", "domain", "node_key", "tariffs", "receipts", "between")
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
    )


# --------------------------------------------------------------------------------------------------------- commitments

COMMITMENT_FORMAT: Final = "tallystick-commitment/1"


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
