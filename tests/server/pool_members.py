"""The members of a pool in a property test: donors and writers that come, hang, die and do their work, and the time that passes."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.server.world import HOST, SETTINGS, Client, Donation, SegmentMemory, World, Write
from vcache.protocol import Tier

picks = st.integers(0, 1000)


class Members(RuleBasedStateMachine):
    """Who is in the pool, on one host unless a subclass has more, and what happens to them."""

    hosts: tuple[bytes, ...] = (HOST,)
    most_donors = 2

    def __init__(self) -> None:
        super().__init__()
        self.world = World(SETTINGS)
        self.made = 0
        self.donors: list[Client] = []
        self.add_donor()
        self.add_donor()
        self.add_writer()

    # --- who is there ---------------------------------------------------------------------------------------------

    def awake(self) -> list[Client]:
        return [c for c in self.world.clients if c.is_alive and not c.is_suspended]

    def one(self, pick: int, among: list[Any]) -> Any:
        return among[pick % len(among)] if among else None

    def writes(self) -> list[tuple[Client, Write]]:
        return [(client, write) for client in self.awake() for write in client.outstanding.values()]

    def donations(self) -> list[Donation]:
        return [donation for client in self.awake() for donation in client.donations]

    @precondition(lambda self: sum(c.is_alive for c in self.donors) < self.most_donors)
    @rule()
    def add_donor(self) -> None:
        self.made += 1
        is_alone = len(self.hosts) == 1
        donation = Donation(
            Client(self.world, f"d{self.made}", host=self._host()),
            SegmentMemory(f"m{self.made}", records=3, units=3),
            tier=Tier.VRAM if self.made % 2 or not is_alone else Tier.DRAM,
            spills=self.made % 2 == 0 and is_alone,
            remote=b"" if is_alone else b"peer",
            register=False,
        )
        self.donors.append(donation.donor)
        donation.register(anew=False)
        donation.hand_over()

    @precondition(lambda self: sum(c.is_alive for c in self.world.clients) < 4)
    @rule()
    def add_writer(self) -> None:
        self.made += 1
        Client(self.world, f"w{self.made}", host=self._host())

    def _host(self) -> bytes:
        return self.hosts[self.made % len(self.hosts)]

    @rule(pick=picks)
    def suspend(self, pick: int) -> None:
        client = self.one(pick, self.awake())
        if client is not None:
            client.is_suspended = True

    @rule(pick=picks)
    def resume(self, pick: int) -> None:
        client = self.one(pick, [c for c in self.world.clients if c.is_alive and c.is_suspended])
        if client is not None:
            client.is_suspended = False

    @rule(pick=picks, messages_arrive=st.booleans())
    def kill(self, pick: int, messages_arrive: bool) -> None:
        client = self.one(pick, [c for c in self.world.clients if c.is_alive])
        if client is not None and pick % 2 == 0:
            client.kill(messages_arrive=messages_arrive)

    @rule(pick=picks)
    def goodbye(self, pick: int) -> None:
        client = self.one(pick, self.awake())
        if client is not None and pick % 4 == 0:
            client.goodbye()

    @rule()
    def restart_server(self) -> None:
        self.world.restart_server()

    @rule()
    def restart_server_and_its_donors_are_quick(self) -> None:
        self.restart_server()
        self.donors_work()

    # --- donors and time ------------------------------------------------------------------------------------------

    @rule(pick=picks, most=st.sampled_from([1, None]))
    def donor_obeys(self, pick: int, most: int | None) -> None:
        donation = self.one(pick, self.donations())
        if donation is not None:
            donation.obey(most)

    @rule(pick=picks)
    def demotion_begins(self, pick: int) -> None:
        donation = self.one(pick, [donation for donation in self.donations() if donation.sinking])
        if donation is not None:
            donation.begin_demotion()

    @rule(pick=picks)
    def demotion_ends(self, pick: int) -> None:
        donation = self.one(pick, [donation for donation in self.donations() if donation.copying])
        if donation is not None:
            donation.finish_demotion()

    @rule(pick=picks)
    def pull_reads(self, pick: int) -> None:
        donation = self.one(pick, [donation for donation in self.donations() if donation.pulls.orders])
        if donation is not None:
            donation.pulls.read_payload()

    @rule(pick=picks)
    def pull_goes_on(self, pick: int) -> None:
        donation = self.one(pick, [donation for donation in self.donations() if donation.pulls.staged])
        if donation is not None:
            donation.pulls.advance()

    @rule(pick=picks, pages=st.sampled_from([1, None]))
    def hand_over(self, pick: int, pages: int | None) -> None:
        donation = self.one(pick, self.donations())
        if donation is not None:
            donation.hand_over(pages, page=1 if pages else 2)

    @rule(pick=picks)
    def drain(self, pick: int) -> None:
        donation = self.one(pick, self.donations())
        if donation is not None and pick % 3 == 0:
            donation.drain()

    @rule()
    def donors_work(self) -> None:
        for client in self.awake():
            if client.donations:
                client.heartbeat()
        for donation in self.donations():
            donation.hand_over()
            donation.obey()
        self.world.tick(drained=False)

    @rule(pick=picks)
    def heartbeat(self, pick: int) -> None:
        client = self.one(pick, self.awake())
        if client is not None:
            client.heartbeat()

    @rule(seconds=st.sampled_from([1.0, 3.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(pick=picks, comes_back=st.booleans())
    def a_donor_is_silent_for_long(self, pick: int, comes_back: bool) -> None:
        donation = self.one(pick, self.donations())
        if donation is not None:
            donation.donor.is_suspended = True
            self.world.pass_time(6.0, beat_s=2.0)
            if comes_back:
                donation.donor.is_suspended = False
                self.donors_work()

    @rule(drained=st.booleans())
    def tick(self, drained: bool) -> None:
        if drained:
            self.world.beat()
        self.world.tick(drained=drained)

    @rule()
    def settle(self) -> None:
        self.world.settle()
