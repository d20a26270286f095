"""API keys of the local gateway: who may spend this node's money through it.

Even on localhost a key is required: any web page can send requests to a local port, and without a key it would spend.
Only SHA-256 hashes are stored (a key is 256 random bits, so the hash needs no salt and no slow function).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from pathlib import Path
from typing import Final

import msgspec

from node.gateway.errors import GatewayError
from node.ports import Clock, Entropy

PREFIX: Final = "sk-tally-"
"""What every key starts with, so that secret scanners and people recognise one."""


class ApiKey(msgspec.Struct, frozen=True):
    """One key as stored. `sha256`: hex hash of the key's text. `created`: Unix seconds."""

    name: str
    sha256: str
    created: int


class _File(msgspec.Struct):
    version: int
    keys: list[ApiKey]


class ApiKeys:
    """The keys in one JSON file of mode 0600. A file changed by another process is read again."""

    def __init__(self, path: Path, *, clock: Clock, entropy: Entropy) -> None:
        self._path = path
        self._clock = clock
        self._entropy = entropy
        self._seen: tuple[int, int, int] | None = None
        self._keys: tuple[ApiKey, ...] = ()

    def create(self, name: str) -> str:
        """Make a key, store its hash, and return its text, which is shown this once.

        Raises: GatewayError (name taken or empty, file unreadable or unwritable).
        """
        keys = self.entries()
        if not name.strip() or any(key.name == name for key in keys):
            raise GatewayError(f"an API key needs a name that is not in use; {name!r} is. No key was made.")
        text = PREFIX + base64.urlsafe_b64encode(self._entropy.token(32)).decode().rstrip("=")
        self._write((*keys, ApiKey(name, _hash(text), self._clock.now_ms() // 1000)))
        return text

    def revoke(self, name: str) -> bool:
        """Forget a key; whether there was one. Raises: GatewayError."""
        keys = self.entries()
        left = tuple(key for key in keys if key.name != name)
        if len(left) != len(keys):
            self._write(left)
        return len(left) != len(keys)

    def entries(self) -> tuple[ApiKey, ...]:
        """The keys as the file has them now. Raises: GatewayError when it cannot be read."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            self._seen, self._keys = None, ()
            return ()
        mark = (found.st_ino, found.st_mtime_ns, found.st_size)
        if mark != self._seen:
            try:
                self._keys = tuple(msgspec.json.decode(self._path.read_bytes(), type=_File).keys)
            except (OSError, msgspec.MsgspecError) as exc:
                raise GatewayError(
                    f"the API key file {self._path} cannot be read ({exc}). It was left as it is, and no request is "
                    "accepted. Restore it, or move it away and make new keys."
                ) from exc
            self._seen = mark
        return self._keys

    def check(self, header: str | None) -> ApiKey | None:
        """The key that an Authorization header presents, or None. Takes as long for a wrong key as for a right one.

        Raises: GatewayError when the file cannot be read.
        """
        scheme, _, text = (header or "").partition(" ")
        presented = _hash(text.strip())
        found: ApiKey | None = None
        for key in self.entries():
            if hmac.compare_digest(key.sha256.encode(), presented.encode()):
                found = key
        return found if scheme.lower() == "bearer" else None

    def _write(self, keys: tuple[ApiKey, ...]) -> None:
        beside = self._path.with_name(self._path.name + ".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)
            # 0600 from the first byte on: a mode set afterwards leaves a moment in which others can open the file.
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(_File(1, list(keys)))))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as exc:
            raise GatewayError(
                f"the API key file {self._path} cannot be written ({exc}). The old keys stay valid. "
                "Check the folder's permissions and free space."
            ) from exc


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
