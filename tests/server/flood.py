"""Floods the server: lookups as fast as the socket takes them, answers thrown away."""

from __future__ import annotations

import zmq

from tests.server.dealer import Dealer
from vcache import protocol
from vcache.config import VCacheConfig

if __name__ == "__main__":
    with Dealer(VCacheConfig()) as dealer:
        dealer.hello()
        message = dealer.message(protocol.Lookup, bytes(16 * 2000), 0.0)
        print("flooding", flush=True)
        while True:
            dealer.socket.send(message)
            while int(dealer.socket.get(zmq.EVENTS)) & zmq.POLLIN:
                dealer.socket.recv()
