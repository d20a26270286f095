"""Where the contracts of one deployment are: the file `deployment.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node.ports import ChainError
from protocol.eip712 import Domain
from protocol.units import Address

_CONTRACTS: Final = ("token", "escrow", "registry", "reservations", "court", "faults")


@dataclass(frozen=True, slots=True)
class Deployment:
    """Addresses of the contracts on chain `chain_id`. `block`: none of them was called before it."""

    chain_id: int
    token: Address
    escrow: Address
    registry: Address
    reservations: Address
    court: Address
    faults: Address
    block: int

    @property
    def domain(self) -> Domain:
        """The EIP-712 domain of every document of this deployment."""
        return Domain(self.chain_id, self.escrow)

    def save(self, path: Path) -> None:
        """Write the file, replacing it whole."""
        body = {"chain_id": self.chain_id, "block": self.block}
        addresses = {name: "0x" + getattr(self, name).hex() for name in _CONTRACTS}
        scratch = path.with_name(path.name + ".new")
        scratch.write_text(json.dumps(body | addresses, indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> Deployment:
        """Raises: ChainError naming the file when it cannot be read or says something else."""
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            addresses = {name: _address(body[name]) for name in _CONTRACTS}
            return cls(chain_id=int(body["chain_id"]), block=int(body["block"]), **addresses)
        except OSError as exc:
            raise ChainError(f"deployment file {path} cannot be read: {exc.strerror}") from exc
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ChainError(f"{path} is no deployment file: {exc!r}") from exc


def _address(text: str) -> Address:
    raw = bytes.fromhex(text.removeprefix("0x"))
    if len(raw) != 20:
        raise ValueError(f"{text} is no address")
    return Address(raw)
