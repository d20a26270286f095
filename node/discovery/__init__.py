"""Who offers what: pulled from peers, kept fresh by gossip, believed only after the chain agrees."""
