"""Copies within the pool, as demotion and promotion make them: *reserve* for a copy, the copy, the check of its source.

In the model all placements lie in one segment; the protocol is the same, wherever a copy goes: it is granted while the pool has
the chunk once, and nobody else copies it. A donor that pulls from another host reads payload and record before it asks for space.
"""

from __future__ import annotations

from tests.model.changes import is_removed, moved, settle, with_item
from tests.model.state import Reservation, Server, State, Steps, Variant, Writer


def may_copy(server: Server, key: str) -> bool:
    """Whether there is something to copy, and no copy of it is there or on its way."""
    placements = [placement for placement in server.entries if placement.key == key]
    return len(placements) == 1 and not any(r.is_live and r.key == key for r in server.reservations)


def copy_steps(state: State, variant: Variant, number: int, writer: Writer) -> Steps:
    """Copies whatever lies in the source's cell; *after* that the source's record says whether it was the chunk's."""
    name, source = f"copier {writer.key}", writer.source
    assert source is not None
    if writer.at == "marked":
        cells = with_item(state.cells, writer.cell, state.cells[source.cell])
        yield f"{name}: copies the payload", moved(state._replace(cells=cells), number, writer, "copied")
        return
    found = state.records[source.record]
    if (found.generation, found.key) == (source.generation, source.key) or not variant.copies_check_their_source:
        yield f"{name}: source is valid", moved(state, number, writer, "written")
        return
    server, after = state.server, moved(state, number, writer, "done")
    mine = next((r for r in server.reservations if r.generation == writer.generation), None)
    if mine is not None and writer.term == server.term:
        after = after._replace(server=settle(server, mine))
    yield f"{name}: source has gone, abort told", after


def pull_steps(state: State, variant: Variant, number: int, writer: Writer) -> Steps:
    """Reads whatever lies in the source's cell, by an order that may be out of date; then the source's record."""
    name = f"puller {writer.key}"
    if writer.at == "idle":
        for placement in [placement for placement in state.server.entries if placement.key == writer.key]:
            yield f"order: pull {writer.key}", moved(state, number, writer._replace(source=placement), "ordered")
        return
    source = writer.source
    assert source is not None
    if writer.at == "ordered":
        staged = writer._replace(staged=state.cells[source.cell])
        yield f"{name}: reads the payload", moved(state, number, staged, "staged")
        return
    found = state.records[source.record]
    if (found.generation, found.key) == (source.generation, source.key) or not variant.copies_check_their_source:
        yield f"{name}: reads the record", moved(state, number, writer, "proven")
    else:
        yield f"{name}: source has gone", moved(state, number, writer, "done")


def may_revive(server: Server, claim: Reservation) -> bool:
    """Whether a claim may still be committed: nobody else writes this chunk, and it was not removed."""
    if any(r.is_live and r.key == claim.key for r in server.reservations):
        return False
    if is_removed(server, claim.key, claim.generation):
        return False
    return claim.is_copy or not any(placement.key == claim.key for placement in server.entries)
