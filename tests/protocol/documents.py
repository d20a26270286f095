"""Hypothesis strategies for every signed document, straight from its Solidity types."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from protocol.eip712 import fields_of
from protocol.messages import DOCUMENTS

secrets = st.integers(1, 2**255).map(lambda n: n.to_bytes(32, "big"))


def values(sol: str) -> st.SearchStrategy[Any]:
    """Any value of a Solidity type."""
    if sol == "address":
        return st.binary(min_size=20, max_size=20)
    if sol == "bytes32":
        return st.binary(min_size=32, max_size=32)
    if sol == "bool":
        return st.booleans()
    return st.integers(0, (1 << int(sol[4:])) - 1)


def documents(struct: Any) -> st.SearchStrategy[Any]:
    """Any document of one type."""
    return st.builds(struct, **{name: values(sol) for name, sol in fields_of(struct)})


any_document = st.one_of(*(documents(struct) for struct in DOCUMENTS))
