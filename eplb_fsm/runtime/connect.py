"""Putting the parts together over a store: the handshake, the groups, the threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch.distributed as dist

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.core.votes import PROTOCOL_VERSION
from eplb_fsm.errors import UsageError
from eplb_fsm.placement.placement import Placement
from eplb_fsm.runtime.assembly import check_banks, check_links, make_planner, plan_task
from eplb_fsm.runtime.bank import Bank
from eplb_fsm.runtime.channel import GlooVoteChannel, VoteChannel
from eplb_fsm.runtime.device import DeviceOps
from eplb_fsm.runtime.domain import Domain, Handshake, check_equal
from eplb_fsm.runtime.marks import BackgroundMarkBoard, StoreMarkBoard
from eplb_fsm.runtime.mesh import MeshVoteChannel
from eplb_fsm.runtime.parts import EngineSide, Links, Parts, assemble, make_pace, make_staging
from eplb_fsm.runtime.peers import check_address
from eplb_fsm.runtime.transport import GlooTransport, Transport
from eplb_fsm.runtime.watchdog import Watchdog
from eplb_fsm.runtime.worker import InlineWorker, Mailbox, ThreadWorker, Worker

_GROUP_TIMEOUT_FACTOR = 100
"""A gloo group's own timeout over the vote timeout: after its own the group would be broken for good."""
_MAX_MESH_RANKS = 16
"""More ranks vote by a reduction."""
_MAX_WATCHDOG_INTERVAL_S = 0.5
_AUTO_LAG = 2
"""Lag at start with ``lag="auto"`` on a host that is not ahead of its device."""


def connect_parts(
    store: dist.Store,
    domain: Domain,
    engine: EngineSide,
    config: RebalanceConfig,
    *,
    channel: VoteChannel | None = None,
    transport: Transport | None = None,
    on_peer_lost: Callable[[Sequence[int]], None] | None = None,
) -> Parts:
    """Check what the engine hands over, meet the other ranks, and build the parts that are not given.

    Blocks until all ranks have come, at most ``start_timeout_s``. Nothing is connected before the configurations,
    banks and placements of all ranks have been compared.

    Args:
        store: Where the ranks find each other; a ``TCPStore``, also behind a prefix.
        domain: This rank and the others.
        engine: What the engine brings.
        config: Equal on all ranks.
        channel: Carries votes; None: connections of its own, and beyond 16 ranks gloo, on a group of its own.
        transport: Moves rows; None: gloo, on a group of its own.
        on_peer_lost: Called from the watchdog's thread with ranks that show no life; None: a log line only.

    Raises:
        EplbError: As :meth:`eplb_fsm.fsm.RebalanceFSM.connect`.
    """
    with contextlib.ExitStack() as opened:
        handshake = Handshake(store, domain, config.start_timeout_s)
        try:
            parts = _connect(store, domain, engine, config, handshake, opened, channel, transport)
            parts.watchdog = _make_watchdog(store, parts, on_peer_lost)
        except BaseException as error:
            handshake.fail(error)
            raise
        opened.pop_all()  # from here on the parts are closed by Parts.close()
    parts.closers.insert(0, parts.watchdog.close)
    parts.leave = handshake.fail
    return parts


def _connect(
    store: dist.Store,
    domain: Domain,
    engine: EngineSide,
    config: RebalanceConfig,
    handshake: Handshake,
    opened: contextlib.ExitStack,
    channel: VoteChannel | None,
    transport: Transport | None,
) -> Parts:
    """First everything that can fail on this rank alone, then the comparison, then what needs all ranks."""
    check_banks(config, domain, engine.banks, engine.placements)
    check_links(config, engine.banks, transport, channel)
    if channel is None and domain.world_size <= _MAX_MESH_RANKS:
        check_address(store)
    task = plan_task(config, domain, engine.banks)
    pace = make_pace(config, engine)
    staging = make_staging(config, task.budget, domain.rank, engine, pace)
    planner = make_planner(config, domain, task)
    if planner is not None:
        opened.callback(planner.close)
    lag = _compare_ranks(handshake, domain, engine, config, channel)
    if channel is None:
        channel = _make_channel(domain, store, config)
        opened.callback(channel.close)
    if transport is None:
        transport = GlooTransport(domain, store, config.transfer_timeout_s, start_timeout_s=config.start_timeout_s)
        opened.callback(transport.close)
    links = Links(
        channel=channel,
        transport=transport,
        board=BackgroundMarkBoard(StoreMarkBoard(domain, store), domain.world_size),
        meet=partial(_meet, handshake),
        lag=lag,
    )
    mailbox = Mailbox()
    worker = _make_worker(config, domain, mailbox, engine.stream())
    opened.callback(worker.close)
    parts = assemble(
        domain,
        config,
        engine,
        links,
        task,
        staging=staging,
        pace=pace,
        mailbox=mailbox,
        worker=worker,
        planner=planner,
    )
    # Tables and counters were filled on the stream of this call, and the engine may read them on another one.
    engine.stream().record_event().wait(config.start_timeout_s)
    return parts


def _make_channel(domain: Domain, store: dist.Store, config: RebalanceConfig) -> VoteChannel:
    if domain.world_size <= _MAX_MESH_RANKS:
        return MeshVoteChannel(domain, store, start_timeout_s=config.start_timeout_s)
    timeout_s = config.vote_timeout_s * _GROUP_TIMEOUT_FACTOR
    return GlooVoteChannel(domain, store, timeout_s, start_timeout_s=config.start_timeout_s)


def _make_worker(config: RebalanceConfig, domain: Domain, mailbox: Mailbox, device: DeviceOps) -> Worker:
    if config.mode == "sync":
        return InlineWorker(mailbox, device)
    return ThreadWorker(mailbox, device, f"eplb-fsm-worker-{domain.rank}")


def _make_watchdog(store: dist.Store, parts: Parts, on_peer_lost: Callable[[Sequence[int]], None] | None) -> Watchdog:
    config = parts.config
    interval_s = min(_MAX_WATCHDOG_INTERVAL_S, config.vote_timeout_s / 10, config.liveness_timeout_s / 10)
    return Watchdog(
        StoreMarkBoard(parts.domain, store),
        parts.show,
        parts.domain,
        interval_s=interval_s,
        timeout_s=config.liveness_timeout_s,
        on_peer_lost=on_peer_lost or (lambda ranks: None),
    )


def _compare_ranks(
    handshake: Handshake, domain: Domain, engine: EngineSide, config: RebalanceConfig, channel: VoteChannel | None
) -> int:
    """Compare what the ranks were started with; return the lag they agree on."""
    wanted_lag = _AUTO_LAG + engine.stream().max_passes_ahead if config.lag == "auto" else config.lag
    offer: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "world_size": domain.world_size,
        "vote channel": "default" if channel is None else type(channel).__name__,
        **asdict(config),
        "number of banks": len(engine.banks),
    }
    for index, (bank, placement) in enumerate(zip(engine.banks, engine.placements, strict=True)):
        offer.update({f"bank {index}: {what}": value for what, value in _describe(bank, placement).items()})
    offers = handshake.exchange("offer", {"lag_steps": wanted_lag, "equal": offer})
    check_equal([other["equal"] for other in offers], domain)
    return 0 if config.mode == "sync" else max(other["lag_steps"] for other in offers)


def _describe(bank: Bank, placement: Placement) -> dict[str, Any]:
    """What must be equal of a bank, in pieces small enough to be shown when they are not."""
    layers = {
        f"layer {layer_id}": ", ".join(f"{tensor} {dtype} {shape}" for tensor, shape, dtype in signature)
        for layer_id, signature in zip(bank.layer_ids, bank.signature, strict=True)
    }
    return {
        "name": bank.name,
        "kind of device": bank.device.type,
        "num_logical_experts": bank.num_logical_experts,
        "num_physical_experts": bank.num_physical_experts,
        **layers,
        "digest of the placement": placement.digest,
    }


def _meet(handshake: Handshake, word: str, step_idx: int) -> None:
    steps = [other["step_idx"] for other in handshake.exchange(word, {"step_idx": step_idx})]
    if len(set(steps)) > 1:
        raise UsageError(
            f"{word}: the ranks stand at steps {steps}, by rank; call it on all of them after the same forward pass"
        )
