"""What foreign libraries do to the whole process at import, undone.

py_ecc, which eth_account and web3 import, raises Python's recursion limit to 100 000. With that, deep nesting in
a stranger's JSON or msgpack overruns the C stack and kills the process instead of raising RecursionError.
"""

from __future__ import annotations

import sys


def tame_py_ecc() -> None:
    """Import py_ecc and keep the recursion limit as it was. Call before the first import of eth_account or web3."""
    limit = sys.getrecursionlimit()
    import py_ecc  # noqa: F401 - imported for its side effect, which is undone here

    sys.setrecursionlimit(limit)
