"""The signed documents have one source: generated files are fresh, and Python and the EVM hash the same vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eth_hash.auto import keccak
from pyrevm import EVM

from contracts import build, generate
from protocol.eip712 import Domain, camel, digest, fields_of, hash_struct, type_hash, type_string
from protocol.errors import FieldOutOfRange
from protocol.messages import DOCUMENTS
from protocol.units import Address

VECTORS = json.loads(generate.VECTORS_PATH.read_text())
BY_NAME = {d.__name__: d for d in DOCUMENTS}
CASES = [(d["name"], vector) for d in VECTORS["documents"] for vector in d["vectors"]]
ACCEPTED = [(name, vector) for name, vector in CASES if "post" in vector]
REFUSED = [(name, vector) for name, vector in CASES if "post" not in vector]


def value_of(field: Any) -> Any:
    """A vector's field as Python holds it."""
    if isinstance(field, bool):
        return field
    return bytes.fromhex(field[2:]) if field.startswith("0x") else int(field)


def message_of(name: str, pre: dict[str, Any]) -> Any:
    struct = BY_NAME[name]
    return struct(**{field: value_of(pre[camel(field)]) for field, _ in fields_of(struct)})


def domain_of(vectors: dict[str, Any]) -> Domain:
    domain = vectors["domain"]
    return Domain(int(domain["chainId"]), Address(value_of(domain["verifyingContract"])))


def test_generated_files_are_fresh() -> None:
    assert generate.stale() == []


def test_check_names_the_stale_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    types = tmp_path / "Types.sol"
    types.write_text(generate.types_source().replace("uint96 cumulative", "uint128 cumulative"))
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "TYPES_PATH", types)
    assert generate.main(["--check"]) == 1
    assert "stale: Types.sol" in capsys.readouterr().err


def test_every_document_has_vectors_of_both_kinds() -> None:
    assert [d["name"] for d in VECTORS["documents"]] == [d.__name__ for d in DOCUMENTS]
    assert {name for name, _ in ACCEPTED} == {name for name, _ in REFUSED} == set(BY_NAME)


def test_python_gives_the_vectors_type_hashes() -> None:
    assert domain_of(VECTORS).separator() == value_of(VECTORS["domain"]["separator"])
    for document in VECTORS["documents"]:
        struct = BY_NAME[document["name"]]
        assert type_string(struct) == document["typeString"]
        assert type_hash(struct) == value_of(document["typeHash"]) == keccak(document["typeString"].encode())


@pytest.mark.parametrize(("name", "vector"), ACCEPTED)
def test_python_hashes_the_vector(name: str, vector: dict[str, Any]) -> None:
    message = message_of(name, vector["pre"])
    assert hash_struct(message) == value_of(vector["post"]["structHash"])
    assert digest(domain_of(VECTORS), message) == value_of(vector["post"]["digest"])


@pytest.mark.parametrize(("name", "vector"), REFUSED)
def test_python_refuses_the_vector(name: str, vector: dict[str, Any]) -> None:
    with pytest.raises(FieldOutOfRange) as refused:
        hash_struct(message_of(name, vector["pre"]))
    assert camel(refused.value.field) == vector["field"]


Call = Callable[[str, bytes], bytes]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Calls the generated Solidity library inside an EVM: (signature, encoded arguments) -> returned bytes."""
    out = tmp_path_factory.mktemp("forge") / "out"
    build.compile_sources(out, "test/TypesHarness.sol")
    output = json.loads((out / "TypesHarness.sol" / "TypesHarness.json").read_text())
    caller = "0x" + "11" * 20
    evm = EVM()
    address = evm.deploy(caller, bytes.fromhex(output["bytecode"]["object"][2:]))

    def call(signature: str, arguments: bytes) -> bytes:
        return bytes(evm.message_call(caller, address, calldata=keccak(signature.encode())[:4] + arguments))

    return call


def word(value: Any) -> bytes:
    """One field as the ABI encodes it, out-of-range values included."""
    if isinstance(value, bytes):
        return value if len(value) >= 32 else value.rjust(32, b"\0")
    return (int(value) % (1 << 256)).to_bytes(32, "big")


def hash_call(name: str, pre: dict[str, Any]) -> tuple[str, bytes]:
    """Signature and arguments of the harness's hash function for this document."""
    fields = fields_of(BY_NAME[name])
    types = ",".join(sol for _, sol in fields)
    return f"hash{name}(({types}))", b"".join(word(value_of(pre[camel(field)])) for field, _ in fields)


@pytest.mark.slow
def test_the_evm_hashes_the_vectors(harness: Call) -> None:
    separator = harness(
        "domainSeparator(uint256,address)",
        word(int(VECTORS["domain"]["chainId"])) + word(value_of(VECTORS["domain"]["verifyingContract"])),
    )
    assert separator == value_of(VECTORS["domain"]["separator"])
    for name, vector in ACCEPTED:
        struct_hash = harness(*hash_call(name, vector["pre"]))
        assert struct_hash == value_of(vector["post"]["structHash"]), name
        assert harness("digest(bytes32,bytes32)", separator + struct_hash) == value_of(vector["post"]["digest"]), name


@pytest.mark.slow
def test_the_evm_refuses_the_vectors(harness: Call) -> None:
    """A value that fits its 32-byte word but not its type reverts. Short and long byte strings have no such word."""
    refused = 0
    for name, vector in REFUSED:
        value = value_of(vector["pre"][vector["field"]])
        if isinstance(value, bytes):
            continue
        with pytest.raises(RuntimeError):
            harness(*hash_call(name, vector["pre"]))
        refused += 1
    assert refused >= len(DOCUMENTS)
