"""Direct streams, gossip and a peer directory behind the `Transport` port: libp2p, and its in-memory twin."""
