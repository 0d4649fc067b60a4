"""Fixtures of the server's tests."""

from __future__ import annotations

import pytest

from tests.server.world import World


@pytest.fixture
def world() -> World:
    """An empty pool in memory, its server just started."""
    return World()
