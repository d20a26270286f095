"""What signing costs: each document hashed, signed, verified, packed and unpacked, one call at a time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

from devnet.bench.workload import summary
from protocol.eip712 import Domain, digest, fields_of
from protocol.messages import ReceiptAck, Voucher, WorkReceipt
from protocol.packing import pack, unpack
from protocol.signing import Signer, verify
from protocol.units import Address

_BATCH = 5
"""Calls timed together: enough that reading the clock is nothing beside them."""


def _filled(struct: Any, salt: str) -> Any:
    """A document of the type whose every field has a plausible width."""
    values: dict[str, Any] = {}
    for name, sol in fields_of(struct):
        seed = hashlib.sha256(f"{salt}/{name}".encode()).digest()
        if sol == "address":
            values[name] = seed[:20]
        elif sol == "bytes32":
            values[name] = seed
        elif sol == "bool":
            values[name] = False
        else:
            values[name] = int.from_bytes(seed[: int(sol.removeprefix("uint")) // 16], "big")
    return struct(**values)


def _timed(call: Callable[[], object], samples: int) -> dict[str, Any]:
    """Microseconds a call."""
    for _ in range(_BATCH):
        call()
    out = []
    for _ in range(samples):
        start = time.perf_counter_ns()
        for _ in range(_BATCH):
            call()
        out.append((time.perf_counter_ns() - start) / 1000 / _BATCH)
    return summary(out, 2)


def signatures(samples: int) -> dict[str, Any]:
    """Per document: microseconds to digest, sign, verify, pack and unpack."""
    domain = Domain(31337, Address(b"\x11" * 20))
    signer = Signer.from_secret(hashlib.sha256(b"bench").digest())
    out: dict[str, Any] = {}
    for struct in (WorkReceipt, Voucher, ReceiptAck):
        document = _filled(struct, "bench")
        signature, packed = signer.sign(domain, document), pack(document)
        calls: dict[str, Callable[[], object]] = {
            "digest": lambda d=document: digest(domain, d),  # type: ignore[misc]
            "sign": lambda d=document: signer.sign(domain, d),  # type: ignore[misc]
            "verify": lambda d=document, s=signature: verify(domain, d, s, signer.address),  # type: ignore[misc]
            "pack": lambda d=document: pack(d),  # type: ignore[misc]
            "unpack": lambda t=struct, p=packed: unpack(t, p),  # type: ignore[misc]
        }
        out[struct.__name__] = {name: _timed(call, samples) for name, call in calls.items()}
    return out
