"""`python -m devnet.adversaries NAME ...`: `tally ...` as that adversary. `--list`: who there is."""

from __future__ import annotations

import sys

from devnet.adversaries.registry import ADVERSARIES, adversary
from protocol.errors import TallyError


def _list() -> None:
    for one in ADVERSARIES:
        print(f"{one.name:20} {one.role:10} {one.how}; gains {one.gain}. Caught by: {one.caught_by}")


def main() -> None:
    """Become the one named first; the rest of the command line is the node's."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "--list"):
        print(__doc__)
        _list()
        return
    try:
        chosen = adversary(words[0])
    except TallyError as exc:
        raise SystemExit(f"{exc}") from exc
    sys.argv[1:] = words[1:]
    chosen.install()
    from node.cli.main import main as tally

    tally()


if __name__ == "__main__":
    main()
