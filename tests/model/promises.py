"""What the protocol promises of every state that can be reached."""

from __future__ import annotations

from tests.model.state import State


def violation(state: State) -> str | None:
    """Which promise this state breaks."""
    server, reader = state.server, state.reader
    if reader.at == "served" and reader.placement is not None and reader.copied != reader.placement.key:
        return f"wrong bytes served: asked for {reader.placement.key}, got {reader.copied!r}"
    busy: dict[int, int] = {}
    for writer in state.writers:
        if writer.may_touch and busy.setdefault(writer.cell, writer.generation) != writer.generation:
            return f"cell {writer.cell} was granted twice"
    for placement in server.entries:
        if busy.get(placement.cell, placement.generation) != placement.generation:
            return f"a writer is at work in the bytes of {placement.key}"
        found = state.records[placement.record]
        if found != (placement.generation, placement.key, placement.cell):
            return f"the index says {placement}, memory says {found}"
        if placement.generation in state.gone:
            return f"{placement.key} was removed, answered, and is back"
    if server.is_open:
        known = {placement.generation for placement in server.entries}
        known |= {retire.generation for retire in server.retiring}
        known |= {reservation.generation for reservation in server.reservations}
        for record in state.records:
            if record.generation and record.generation % 2 == 0 and record.generation not in known:
                return f"nobody knows of the committed {record}"
    return None
