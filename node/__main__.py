"""`python -m node` is `tally`."""

from node.cli.main import main

main()
