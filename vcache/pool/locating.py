"""Which of some chunks the pool has: an answer for each key, where ``PoolClient.lookup`` answers the leading run."""

from __future__ import annotations

from vcache import protocol
from vcache.pool.client import PoolClient
from vcache.protocol import Located


def locate(client: PoolClient, keys: bytes, lease_s: float = 0.0) -> Located | None:
    """What is present of ``keys`` (16 bytes each, joined; at most ``MAX_KEYS_PER_CALL``); leased if ``lease_s`` is positive.

    One round trip. The lease, if any, is the caller's to ``release``. ``None`` when the server is unavailable.
    """
    return client.ask(
        Located,
        lambda id_, session, term: protocol.Locate(id_, session, term, keys, lease_s),
        lambda reply: reply if client.session.leased(reply.term, reply.lease) else None,
    )
