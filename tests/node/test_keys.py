"""Key files: the same key for ever, private, whole or absent, and errors that name the way back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from node import keys
from node.keys import KeystoreError, addresses, key_path, load, load_or_create, read_password, save

CHEAP = 1 << 10


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TALLY_SCRYPT_N", raising=False)


def _make(directory: Path) -> bytes:
    return bytes(load_or_create(directory, "node", "pass", scrypt_n=CHEAP).secret)


def test_a_name_stands_for_one_key_and_the_file_is_private(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    made = load_or_create(directory, "wallet", "pass", scrypt_n=CHEAP)
    assert load_or_create(directory, "wallet", b"pass") == made == load(directory, "wallet", "pass")
    assert load_or_create(directory, "node", "pass", scrypt_n=CHEAP) != made
    assert list(addresses(directory).items())[1] == ("wallet", made.address)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    assert directory.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in directory.iterdir()) == ["node.json", "wallet.json"], "no scraps"


def test_the_file_is_a_keystore_any_wallet_opens(tmp_path: Path) -> None:
    from eth_account import Account

    secret = bytes(range(1, 33))
    signer = save(tmp_path, "wallet", "grün", secret, scrypt_n=CHEAP)
    stored = json.loads((tmp_path / "wallet.json").read_text())
    assert (stored["version"], stored["crypto"]["kdf"], stored["crypto"]["kdfparams"]["n"]) == (3, "scrypt", CHEAP)
    assert bytes(Account.decrypt(stored, "grün")) == secret
    assert bytes.fromhex(Account.from_key(secret).address[2:]) == signer.address
    assert secret.hex() not in repr(signer)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    kept = _make(tmp_path)
    with pytest.raises(FileExistsError):
        save(tmp_path, "node", "pass", bytes(range(1, 33)), scrypt_n=CHEAP)
    assert _make(tmp_path) == kept


def test_processes_that_create_at_once_get_one_key(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        assert len(set(pool.map(_make, [tmp_path / "keys"] * 12))) == 1


def test_a_wrong_password_says_so_and_changes_nothing(tmp_path: Path) -> None:
    _make(tmp_path)
    before = (tmp_path / "node.json").read_bytes()
    with pytest.raises(KeystoreError, match=r"the password does not open .*node\.json"):
        load_or_create(tmp_path, "node", "other")
    assert (tmp_path / "node.json").read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused_with_the_command(tmp_path: Path, mode: int) -> None:
    _make(tmp_path)
    path = tmp_path / "node.json"
    path.chmod(mode)
    with pytest.raises(KeystoreError, match=f"chmod 600 {path}"):
        load(tmp_path, "node", "pass")
    with pytest.raises(KeystoreError, match="chmod 600"):
        addresses(tmp_path)


def test_a_directory_that_others_can_write_is_refused_with_the_command(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(KeystoreError, match=f"chmod 700 {tmp_path}"):
        _make(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        stored = json.loads(text)
        change(stored)
        return json.dumps(stored)

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\x00" * 400,
        lambda text: "[]",
        _edit(lambda stored: stored.pop("crypto")),
        _edit(lambda stored: stored.update(version=4)),
        _edit(lambda stored: stored.update(address="00" * 20)),
        _edit(lambda stored: stored["crypto"].pop("mac")),
        _edit(lambda stored: stored["crypto"].update(kdf="none")),
        _edit(lambda stored: stored["crypto"].update(ciphertext="zz")),
        _edit(lambda stored: stored["crypto"]["kdfparams"].update(n=3)),
    ],
)
def test_a_corrupted_file_is_named_with_the_way_back_and_left(tmp_path: Path, damage: Callable[[str], str]) -> None:
    _make(tmp_path)
    path = tmp_path / "node.json"
    path.write_text(damage(path.read_text()))
    damaged = path.read_bytes()
    with pytest.raises(KeystoreError, match=rf"{path} is corrupted .*Restore it from your copy"):
        load_or_create(tmp_path, "node", "pass")
    assert path.read_bytes() == damaged


def test_what_is_no_key_or_no_name_or_no_password_is_refused(tmp_path: Path) -> None:
    for secret in (b"\0" * 32, b"\xff" * 32, b"short"):
        with pytest.raises(KeystoreError, match="no secp256k1 key") as caught:
            save(tmp_path, "node", "pass", secret, scrypt_n=CHEAP)
        assert secret.hex() not in str(caught.value)
    for name in ("../node", "", ".hidden", "Node", "a/b"):
        with pytest.raises(KeystoreError, match="key name"):
            key_path(tmp_path, name)
    with pytest.raises(KeystoreError, match="empty password"):
        load_or_create(tmp_path, "node", "")
    with pytest.raises(KeystoreError, match="there is no key file"):
        load(tmp_path, "node", "pass")
    assert list(tmp_path.iterdir()) == []


def test_the_work_factor_comes_from_the_caller_then_the_environment_then_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert keys._scrypt_n(None) == 1 << 18
    monkeypatch.setenv("TALLY_SCRYPT_N", "8192")
    assert keys._scrypt_n(None) == 8192
    assert keys._scrypt_n(1 << 12) == 1 << 12
    for wrong in ("12", "many", "5000"):
        monkeypatch.setenv("TALLY_SCRYPT_N", wrong)
        with pytest.raises(KeystoreError, match="power of two"):
            keys._scrypt_n(None)


def test_a_key_that_does_not_fit_on_the_disk_is_not_made(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from node.keys import load_or_create, KeystoreError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: load_or_create(Path(sys.argv[1]), 'node', 'pass', scrypt_n=1024)\n"
        "except KeystoreError as exc: print(exc)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True).stdout
    assert "No key was made" in out
    assert list(tmp_path.iterdir()) == []


def test_the_password_is_the_first_line_of_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "password"
    with pytest.raises(KeystoreError, match=r"does not exist. Make it: \(umask 077"):
        read_password(path)
    path.write_bytes("grün and blue \r\nsecond line\n".encode())
    path.chmod(0o644)
    with pytest.raises(KeystoreError, match=f"chmod 600 {path}"):
        read_password(path)
    path.chmod(0o600)
    assert read_password(path) == "grün and blue ".encode()
    path.write_bytes(b"\n")
    with pytest.raises(KeystoreError, match="is empty"):
        read_password(path)
    with pytest.raises(KeystoreError, match="cannot be read"):
        (tmp_path / "directory").mkdir(mode=0o700)
        read_password(tmp_path / "directory")


def test_importing_keys_settings_and_logs_pulls_in_nothing_slow() -> None:
    program = (
        "import sys; import node.keys, node.config, node.log\n"
        "print([name for name in ('eth_account', 'coincurve', 'sqlalchemy', 'web3', 'torch') if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert out.stdout.strip() == "[]"
