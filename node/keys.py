"""Key files: secp256k1 secrets as JSON keystores (V3, scrypt), private to this user, written once and whole.

A name stands for one key (`wallet`, `node`, `session-...`): `load_or_create` gives the same key for ever, also when
several processes ask at once. Passwords come from a file (`--password-file`, TALLY_PASSWORD_FILE), never from argv or
the environment, which other processes can read. Nothing here logs a secret or puts one into an error.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from node.foreign import tame_py_ecc
from protocol.errors import TallyError
from protocol.units import Address

if TYPE_CHECKING:
    from protocol.signing import Signer

SCRYPT_N: Final = 1 << 18
"""Work factor of new key files: 1.7 s and 256 MiB per unlock. Each halving halves what a thief of the file pays per
guess. Tests and the devnet set TALLY_SCRYPT_N=8192 (0.06 s)."""

MIN_SCRYPT_N: Final = 1 << 10
"""Below this a file would be encrypted in name only."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_OTHERS: Final = 0o077
_OTHERS_WRITE: Final = 0o022


class KeystoreError(TallyError):
    """A key file or password file cannot be used; says which and what to do."""


def key_path(directory: Path, name: str) -> Path:
    """Where the key of that name lies. Raises: KeystoreError for a name that is no plain file name."""
    if not _NAME.fullmatch(name):
        raise KeystoreError(f"key name {name!r} must be lower-case letters, digits, dots, dashes or underscores")
    return directory / f"{name}.json"


def read_password(path: Path) -> bytes:
    """The first line of a password file.

    Raises: KeystoreError when it is missing, empty, or readable by others.
    """
    try:
        _refuse_others(path)
        line = path.read_bytes().partition(b"\n")[0].rstrip(b"\r")
    except FileNotFoundError as exc:
        raise KeystoreError(
            f"the password file {path} does not exist. Make it: (umask 077; head -c 24 /dev/urandom | base64 > {path})"
        ) from exc
    except OSError as exc:
        raise KeystoreError(f"the password file {path} cannot be read: {exc.strerror}") from exc
    if not line:
        raise KeystoreError(f"the password file {path} is empty: write the password into its first line")
    return line


def load(directory: Path, name: str, password: str | bytes) -> Signer:
    """Decrypt a key.

    Raises: KeystoreError (missing, readable by others, corrupted, wrong password).
    """
    tame_py_ecc()
    from eth_account import Account  # slow to import

    from protocol.signing import Signer

    path = key_path(directory, name)
    stored, address = _parse(path)
    try:
        signer = Signer.from_secret(bytes(Account.decrypt(stored, _bytes(password))))
    except ValueError as exc:
        if "MAC mismatch" in str(exc):
            raise KeystoreError(
                f"the password does not open {path} (key {_hex(address)}). Nothing was changed: give the password file "
                f"it was made with"
            ) from exc
        raise _corrupted(path, str(exc)) from exc
    except (KeyError, TypeError, AttributeError, NotImplementedError) as exc:
        raise _corrupted(path, f"{type(exc).__name__}: {exc}") from exc
    if signer.address != address:
        raise _corrupted(path, f"it names {_hex(address)} but holds the key of {_hex(signer.address)}")
    return signer


def load_or_create(directory: Path, name: str, password: str | bytes, *, scrypt_n: int | None = None) -> Signer:
    """The key of that name, made at random if there is none. `scrypt_n`: for a new file; TALLY_SCRYPT_N, else 2**18.

    Safe when called by several processes at once: one key wins and all return it.
    Raises: KeystoreError as `load`, or when the file cannot be written.
    """
    if not key_path(directory, name).exists():
        with suppress(FileExistsError):
            return save(directory, name, password, secrets.token_bytes(32), scrypt_n=scrypt_n)
    return load(directory, name, password)


def save(directory: Path, name: str, password: str | bytes, secret: bytes, *, scrypt_n: int | None = None) -> Signer:
    """Encrypt `secret` (32 bytes) into a new file, durable on return; an existing key is never overwritten.

    Raises: FileExistsError; KeystoreError (no valid key, empty password, directory open to others, no room).
    """
    tame_py_ecc()
    from eth_account import Account  # slow to import

    from protocol.signing import Signer

    path = key_path(directory, name)
    if not password:
        raise KeystoreError(f"an empty password does not protect {path}: write one into the password file")
    try:
        if len(secret) != 32:  # the curve's library would pad it
            raise ValueError(f"{len(secret)} bytes")
        signer = Signer.from_secret(secret)
    except ValueError as exc:
        raise KeystoreError(f"what was given for {path} is no secp256k1 key") from exc
    stored = Account.encrypt(secret, _bytes(password), "scrypt", _scrypt_n(scrypt_n))
    try:
        _make_private_directory(directory)
        _write_new(path, json.dumps(stored).encode() + b"\n")
    except FileExistsError:
        raise
    except OSError as exc:
        raise KeystoreError(f"the key file {path} cannot be written: {exc.strerror}. No key was made") from exc
    return signer


def addresses(directory: Path) -> dict[str, Address]:
    """Name -> address of every key file in a directory, in order of name; needs no password.

    Raises: KeystoreError for a corrupted file or one that others can read.
    """
    return {path.stem: _parse(path)[1] for path in sorted(directory.glob("*.json"))}


# --------------------------------------------------------------------------------------------------------------- files


def _bytes(password: str | bytes) -> bytes:
    return password.encode() if isinstance(password, str) else password


def _hex(address: bytes) -> str:
    return f"0x{address.hex()}"


def _corrupted(path: Path, finding: str) -> KeystoreError:
    return KeystoreError(
        f"the key file {path} is corrupted ({finding}) and was left as it is. Restore it from your copy of "
        f"{path.parent.name}/: the funds and the name of this key can be reached with it only. If it never held "
        f"funds, move it aside and a new key is made"
    )


def _scrypt_n(given: int | None) -> int:
    """The work factor to use. Raises: KeystoreError when it is no power of two of at least MIN_SCRYPT_N."""
    text = os.environ.get("TALLY_SCRYPT_N", "")
    if given is None and text and not text.isdecimal():
        raise KeystoreError(f"TALLY_SCRYPT_N={text}: expected a power of two, such as {SCRYPT_N}")
    n = given if given is not None else int(text or SCRYPT_N)
    if n < MIN_SCRYPT_N or n & (n - 1):
        raise KeystoreError(f"scrypt work factor {n}: expected a power of two of at least {MIN_SCRYPT_N}")
    return n


def _refuse_others(path: Path) -> None:
    """Raises: KeystoreError with the command that helps; OSError when the file cannot be looked at."""
    mode = path.stat().st_mode & 0o777
    if mode & _OTHERS:
        raise KeystoreError(f"{path} can be used by other users of this machine (mode {mode:o}). Run: chmod 600 {path}")


def _parse(path: Path) -> tuple[dict[str, Any], Address]:
    """A key file's JSON and the address it names. Raises: KeystoreError."""
    try:
        _refuse_others(path)
        stored = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise KeystoreError(f"there is no key file {path}. Make the key first, or restore it from your copy") from exc
    except OSError as exc:
        raise KeystoreError(f"the key file {path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise _corrupted(path, f"no JSON: {exc}") from exc
    try:
        address = bytes.fromhex(stored["address"].removeprefix("0x"))
        if stored["version"] != 3 or not isinstance(stored["crypto"], dict) or len(address) != 20:
            raise ValueError("no keystore of version 3")
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise _corrupted(path, f"no keystore of version 3: {exc}") from exc
    return stored, Address(address)


def _make_private_directory(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = directory.stat().st_mode & 0o777
    if mode & _OTHERS_WRITE:
        raise KeystoreError(f"other users can put files into {directory} (mode {mode:o}). Run: chmod 700 {directory}")


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, and survives a power cut. Raises: FileExistsError, OSError."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A link, because renaming would silently replace the key of a process that was faster.
        os.link(part, path)
        names = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(names)
        finally:
            os.close(names)
    finally:
        part.unlink(missing_ok=True)
