"""Compile one grammar in a process that may be lost: run as a script, the grammar on standard input.

Compiling is native code that cannot be interrupted, and a few bytes of schema can make it take minutes and gigabytes
(`{"multipleOf": 9999991}`) or end the process. What passes here, over single bytes as tokens, is as cheap in the
engine. Exit 0: fine. Exit 1: refused, the reason on standard output. Anything else: it went beyond its limits.
"""

from __future__ import annotations

import resource
import sys
from typing import Final

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

CPU_SECONDS: Final = 2
"""CPU time a grammar may take to compile. Unit: seconds. Schemas of real tools take milliseconds; doubling it doubles
what one request can burn before it is refused, for nothing."""

MEMORY_BYTES: Final = 1 << 30
"""Address space of the checking process. Unit: bytes. Real grammars stay below 50 MB above the library's own."""

_EOS: Final = 256


class _Bytes:
    """A tokenizer of 256 single bytes and an end token, as TokenizerWrapper reads it."""

    eos_token_id = _EOS
    bos_token_id = None
    tokens = [bytes([i]) for i in range(_EOS)] + [b"<end>"]
    special_token_ids = [_EOS]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def main() -> int:
    """Raises: nothing; limits end the process."""
    source = sys.stdin.buffer.read().decode()
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    matcher = LLMatcher(tokenizer, source, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        sys.stdout.write(matcher.get_error())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
