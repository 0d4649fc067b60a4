"""What can be told of a message that cannot be read; and that no bytes whatever upset the state machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.server.world import Client, World, key
from vcache import protocol
from vcache.protocol import Error, ErrorCode
from vram_metadata_server.intake import answer_id
from vram_metadata_server.integrity import check_integrity

SESSION = b"s" * 16


@given(st.integers(0, 2**63 - 1))
def test_the_id_of_a_cut_off_request_is_found(number: int) -> None:
    message = protocol.encode(protocol.Lookup(number, SESSION, 1, key(1), 0.0))
    assert answer_id(message[:-1]) == number


def test_a_one_way_message_wants_no_answer() -> None:
    for message in (
        protocol.Release(1, SESSION, 1, 2, []),
        protocol.Commit(1, SESSION, 1, []),
        protocol.Touch(1, SESSION, 1, b""),
    ):
        assert answer_id(protocol.encode(message)) is None


def test_an_array_with_a_long_head_is_understood() -> None:
    body = protocol.encode(protocol.Lookup(77, SESSION, 1, key(1), 0.0))[1:]
    assert answer_id(b"\xdc\x00\x06" + body) == 77
    assert answer_id(b"\xdd\x00\x00\x00\x06" + body) == 77


@given(st.binary(max_size=64))
def test_any_bytes_have_an_answer(message: bytes) -> None:
    found = answer_id(message)
    assert found is None or 0 <= found < 1 << 63


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=80),
            st.recursive(
                st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.binary(max_size=40), st.text(max_size=10)),
                lambda inner: st.lists(inner, max_size=12),
                max_leaves=24,
            ).map(protocol.encode),
        ),
        max_size=8,
    )
)  # fmt: skip
def test_no_bytes_upset_the_state_machine(messages: list[bytes]) -> None:
    world = World()
    donor = world.donor("d").donor
    donor.store([key(1)])
    for message in messages:
        for _, reply in world.service.handle(b"stranger", message, world.now):
            assert isinstance(reply, Error | protocol.ServerStats)
        world.tick()
    world.check()
    assert donor.hits([key(1)]) == 1


_FIELDS = st.one_of(
    st.integers(0, 5), st.just(2**63 - 1), st.sampled_from([b"", key(1), key(1) + key(2), b"odd", SESSION]),
    st.floats(0, 100), st.booleans(), st.just([]), st.lists(st.integers(0, 2**62), max_size=3), st.lists(st.just(SESSION), max_size=2),
)  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 19), st.lists(_FIELDS, max_size=9)), max_size=12))
def test_no_well_formed_nonsense_of_a_member_upsets_it(calls: list[tuple[int, list[object]]]) -> None:
    world = World()
    donor = world.donor("d").donor
    donor.store([key(3)])
    liar = Client(world, "liar")
    for tag, fields in calls:
        message = protocol.encode([tag, 5, liar.session, world.service.term, *fields])
        for _, reply in world.service.handle(b"liar/calls", message, world.now):
            assert not isinstance(reply, Error) or reply.code in set(ErrorCode)
        world.tick()
    check_integrity(world.service)
