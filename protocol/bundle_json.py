"""A bundle as one JSON text: self-contained, readable, and one spelling per value.

Bytes are 0x-hexadecimal in lower case, uint64 and uint96 decimal strings, smaller integers numbers. What `decode` takes
is exactly what `encode` gives: no field more, none less.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from protocol.bundle import Bundle, Notch
from protocol.eip712 import Domain, fields_of
from protocol.errors import RemoteProtocolError
from protocol.messages import Accept, JobRequest, Profile, Tariff, Voucher, WorkReceipt
from protocol.options import MAX_OPTIONS_BYTES
from protocol.units import Address, Digest

FORMAT: Final = "tallystick-bundle/2"

MAX_DEPTH: Final = 8
"""Deepest nesting of the text. A bundle has five levels; the rest is room for mistakes worth a clearer message."""

T = TypeVar("T")


@dataclass
class MalformedBundle(RemoteProtocolError):
    """A text that is no bundle: `at` is the path of what is wrong, "" for the whole."""

    at: str
    problem: str

    def __str__(self) -> str:
        return f"this is no receipt bundle: {self.at or 'the text'} {self.problem}"


def _hex(value: bytes) -> str:
    return "0x" + value.hex()


def encode(bundle: Bundle) -> str:
    """The bundle as JSON, ending in a newline."""
    tariff = None if bundle.tariff is None else signed_json(bundle.tariff, bundle.tariff_signature)
    tree = {
        "format": FORMAT,
        "domain": domain_json(bundle.domain),
        "node_key": _hex(bundle.node_key),
        "profile": None if bundle.profile is None else document_json(bundle.profile),
        "tariff": tariff,
        "options": _hex(bundle.options),
        "request": signed_json(bundle.request, bundle.request_signature),
        "accept": signed_json(bundle.accept, bundle.accept_signature),
        "receipts": [_notch(notch) for notch in bundle.notches],
    }
    return json.dumps(tree, indent=1) + "\n"


def signed_json(document: Any, signature: bytes) -> dict[str, Any]:
    """A document and its signature, as `Node.signed` reads them back."""
    return {"document": document_json(document), "signature": _hex(signature)}


def _notch(notch: Notch) -> dict[str, Any]:
    return {
        "digest": _hex(notch.digest),
        **signed_json(notch.receipt, notch.receipt_signature),
        "voucher": None if notch.voucher is None else signed_json(notch.voucher, notch.voucher_signature),
        "ack_signature": _hex(notch.ack_signature),
        "token_ids": list(notch.token_ids),
    }


def domain_json(domain: Domain) -> dict[str, str]:
    """The deployment that documents were signed for."""
    return {"chain_id": str(domain.chain_id), "escrow": _hex(domain.verifying_contract)}


def document_json(document: Any) -> dict[str, Any]:
    """A document's fields as JSON values."""

    def shown(sol: str, value: Any) -> Any:
        if sol in ("address", "bytes32"):
            return _hex(value)
        return str(int(value)) if sol in ("uint64", "uint96") else bool(value) if sol == "bool" else int(value)

    kind: Any = type(document)
    return {name: shown(sol, getattr(document, name)) for name, sol in fields_of(kind)}


def decode(text: str) -> Bundle:
    """The inverse of `encode`; every field must be there, of its type, and nothing else. Raises: MalformedBundle."""
    node = parse(text)
    names = ("format", "domain", "node_key", "profile", "tariff", "options", "request", "accept", "receipts")
    top = node.object(*names)
    if top["format"].value != FORMAT:
        raise MalformedBundle("format", f"is {top['format'].value!r}, expected {FORMAT!r}")
    tariff, tariff_signature = None, b""
    if top["tariff"].value is not None:
        tariff, tariff_signature = top["tariff"].signed(Tariff)
    request, request_signature = top["request"].signed(JobRequest)
    accept, accept_signature = top["accept"].signed(Accept)
    return Bundle(
        domain=top["domain"].domain(),
        node_key=Address(top["node_key"].hexadecimal(20)),
        request=request,
        request_signature=request_signature,
        accept=accept,
        accept_signature=accept_signature,
        options=top["options"].some_bytes(MAX_OPTIONS_BYTES),
        profile=None if top["profile"].value is None else top["profile"].document(Profile),
        tariff=tariff,
        tariff_signature=tariff_signature,
        notches=tuple(item.notch() for item in top["receipts"].items()),
    )


def parse(text: str) -> Node:
    """The text's outermost value, for typed access. Raises: MalformedBundle when it is no JSON or too deep."""
    _refuse_depth(text)
    try:
        return Node("", json.loads(text))
    except ValueError as exc:
        raise MalformedBundle("", f"is no JSON ({exc})") from exc


def _refuse_depth(text: str) -> None:
    """Before the parser sees it: where the interpreter's recursion limit was raised, it would overrun the C stack.

    A bundle's strings hold no brackets, so all of them count. Raises: MalformedBundle.
    """
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_DEPTH:
            raise MalformedBundle("", "is nested too deeply")


@dataclass(frozen=True, slots=True)
class Node:
    """A JSON value and its path, with typed access. All raise MalformedBundle."""

    path: str
    value: Any

    def fail(self, problem: str) -> MalformedBundle:
        return MalformedBundle(self.path, problem)

    def object(self, *names: str) -> dict[str, Node]:
        if not isinstance(self.value, dict):
            raise self.fail("must be an object")
        if set(self.value) != set(names):
            odd = sorted(set(self.value) ^ set(names))
            raise self.fail(f"must have exactly the fields {', '.join(names)}; see {', '.join(map(str, odd))}")
        return {name: Node(f"{self.path}.{name}".lstrip("."), self.value[name]) for name in names}

    def items(self) -> list[Node]:
        if not isinstance(self.value, list):
            raise self.fail("must be a list")
        return [Node(f"{self.path}[{index}]", item) for index, item in enumerate(self.value)]

    def hexadecimal(self, *sizes: int) -> bytes:
        """Bytes of one of the given lengths, lower-case hexadecimal with 0x: one value, one spelling."""
        if isinstance(self.value, str) and self.value.startswith("0x"):
            try:
                raw = bytes.fromhex(self.value[2:])
            except ValueError:
                raw = None
            if raw is not None and len(raw) in sizes and _hex(raw) == self.value:
                return raw
        raise self.fail(f"must be 0x and {' or '.join(str(2 * size) for size in sizes)} lower-case hexadecimal digits")

    def some_bytes(self, limit: int) -> bytes:
        """Up to `limit` bytes, in the same spelling."""
        size = len(self.value) // 2 - 1 if isinstance(self.value, str) else 0
        if size > limit:
            raise self.fail(f"must have at most {limit} bytes")
        return self.hexadecimal(size)

    def decimal(self, bits: int) -> int:
        """An integer below 2**bits as a decimal string without leading zeros."""
        text = self.value
        if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 80 and str(int(text)) == text:
            number = int(text)
            if number >> bits == 0:
                return number
        raise self.fail(f"must be a decimal string below 2**{bits}")

    def number(self, bits: int) -> int:
        """A JSON integer below 2**bits."""
        if type(self.value) is not int or not 0 <= self.value < 1 << bits:
            raise self.fail(f"must be an integer from 0 to {(1 << bits) - 1}")
        return self.value

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.fail("must be true or false")
        return self.value

    def document(self, struct: type[T]) -> T:
        kind: Any = struct
        sols = dict(fields_of(kind))
        found = self.object(*sols)
        return struct(**{name: found[name].field(sol) for name, sol in sols.items()})

    def field(self, sol: str) -> Any:
        """A field of a signed document."""
        match sol:
            case "address":
                return Address(self.hexadecimal(20))
            case "bytes32":
                return Digest(self.hexadecimal(32))
            case "bool":
                return self.flag()
            case "uint64" | "uint96":
                return self.decimal(int(sol[4:]))
            case _:
                return self.number(int(sol[4:]))

    def domain(self) -> Domain:
        """What `domain_json` wrote."""
        parts = self.object("chain_id", "escrow")
        return Domain(parts["chain_id"].decimal(256), Address(parts["escrow"].hexadecimal(20)))

    def signed(self, struct: type[T]) -> tuple[T, bytes]:
        parts = self.object("document", "signature")
        return parts["document"].document(struct), parts["signature"].hexadecimal(0, 65)

    def notch(self) -> Notch:
        parts = self.object("digest", "document", "signature", "voucher", "ack_signature", "token_ids")
        voucher, voucher_signature = None, b""
        if parts["voucher"].value is not None:
            voucher, voucher_signature = parts["voucher"].signed(Voucher)
        return Notch(
            digest=Digest(parts["digest"].hexadecimal(32)),
            receipt=parts["document"].document(WorkReceipt),
            receipt_signature=parts["signature"].hexadecimal(0, 65),
            voucher=voucher,
            voucher_signature=voucher_signature,
            ack_signature=parts["ack_signature"].hexadecimal(0, 65),
            token_ids=tuple(item.number(32) for item in parts["token_ids"].items()),
        )
