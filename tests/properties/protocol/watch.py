"""What must hold in a cluster beyond its events: in its slots, its maps and the votes that were cast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

from eplb_fsm.core.invariants import every_expert_reachable
from eplb_fsm.core.states import State
from eplb_fsm.core.votes import Vote
from eplb_fsm.observe.events import Event
from eplb_fsm.placement import Placement
from eplb_fsm.placement.plan import live_digest
from eplb_fsm.simulate.cluster import SimulatedCluster, SimulatedRank
from eplb_fsm.simulate.engine import WrongForwardError


class Watch:
    """Looks at a cluster from outside; what it finds has the name of the broken invariant before it.

    Args:
        cluster: Before its first step.
        events: Those of all its ranks, growing.

    Attributes:
        on_vote: Called with the rank and its vote after one was cast.
    """

    def __init__(self, cluster: SimulatedCluster, events: Sequence[Event]) -> None:
        self.on_vote: Callable[[int, Vote], object] = lambda rank, vote: None
        self._cluster = cluster
        self._events = events
        self._own_passes = count(1)
        self._last_cast = [0] * len(cluster.ranks)
        for rank in cluster.ranks:
            # The channel is the last place where a vote is seen before it is one.
            rank.channel.post = self._noting(rank, rank.channel.post)  # type: ignore[method-assign]

    def _noting(self, rank: SimulatedRank, post: Callable[[Vote], None]) -> Callable[[Vote], None]:
        def note(vote: Vote) -> None:
            post(vote)
            self._last_cast[rank.rank] = vote.round_idx
            self.on_vote(rank.rank, vote)

        return note

    def slots(self) -> list[str]:
        """What slots hold is what the maps say, and every expert has one; on the ranks that still run, at any time."""
        found = []
        for rank in self._cluster.living:
            for layer in rank.maps.physical_to_logical_map.tolist():
                missing = every_expert_reachable(layer, self._cluster.shape.num_logical_experts)
                found += [f"every_expert_reachable: rank {rank.rank}: {text}" for text in missing]
            num_forwards = rank.engine.num_forwards
            try:
                rank.engine.forward(-next(self._own_passes), rank.maps)
            except WrongForwardError as error:
                found.append(f"live_equals_map: {error}")
            rank.engine.num_forwards = num_forwards  # the device must not believe that it is a pass further
        return found

    def torn(self) -> list[str]:
        """In no forward pass two ranks used different maps; those that only look at slots have no number above 0."""
        return [f"no_torn_forward: pass {pass_idx}" for pass_idx in self._cluster.torn_passes() if pass_idx > 0]

    def beliefs(self) -> list[str]:
        """Once the devices have caught up, the maps are those of which the ranks vote the digest."""
        shape, found = self._cluster.shape, []
        last = {event.rank: event for event in self._events}
        for rank in self._cluster.living:
            table = rank.maps.physical_to_logical_map.numpy()
            live = live_digest([Placement(table, shape.num_logical_experts, len(self._cluster.ranks))])
            event = last.get(rank.rank)
            if event is not None and live != event.live_digest:
                name = "stopped_harmless" if event.state == "STOPPED" else "live_equals_map"
                found.append(f"{name}: rank {rank.rank}: the map is not the one that it said last")
            if rank.parts.runner.live_digest != rank.fsm._core.live_digest:
                found.append(f"live_equals_map: rank {rank.rank} plans from another placement than it votes")
        return found

    def stops(self) -> list[str]:
        """A rank that has stopped has voted in every round that another one waits for."""
        awaited = {rank.rank: 0 for rank in self._cluster.ranks}
        for event in self._events:
            if event.action == "PostVote":
                awaited[event.rank] = event.round_idx
        found = []
        for rank in self._cluster.ranks:
            if rank.fsm.state is not State.STOPPED or rank.channel.is_lost:
                continue
            longest = max(round_idx for other, round_idx in awaited.items() if other != rank.rank)
            if longest > self._last_cast[rank.rank]:
                found.append(f"no_silent_stop: rank {rank.rank} stopped without a vote in round {longest}")
        return found
