"""Peer ids under the transport's own name; protocol/peers.py says what they are, because offers are checked by them."""

from protocol.peers import NotOurKey, address_of_peer, peer_id_of_key, peer_id_of_secret

__all__ = ["NotOurKey", "address_of_peer", "peer_id_of_key", "peer_id_of_secret"]
