"""The transfer engines there are."""

from __future__ import annotations

from vcache.remote.base import EngineSetup, RemoteEngine


def open_engine(setup: EngineSetup) -> RemoteEngine:
    """The engine that ``setup`` names, ready for calls."""
    from vcache.remote.mooncake import MooncakeEngine  # heavy; a second engine joins here

    return MooncakeEngine(setup)
