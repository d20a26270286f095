"""Cheats that really run: each a provider, client or validator of the node's own parts, bent at one place.

`python -m devnet.adversaries NAME ...` is `tally ...` as that party; `--list` shows who there is, how each cheats, what
it gains by it and what catches it. Nothing here is imported by a node.
"""
