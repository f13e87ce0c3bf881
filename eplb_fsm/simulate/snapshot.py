"""Going back: what the parts of a run hold, saved at one moment and put back in place.

The parts keep their identity, so nothing has to be wired up again. What a run makes on its way (votes, events, plans,
commit programs) is not changed after it was made, so references to it are enough. A generator cannot be put back, so
a snapshot is taken only while no job of a worker is under way, and chance is left to the caller.
"""

from __future__ import annotations

import queue
from collections import deque
from typing import Any

import torch

from eplb_fsm.config import RebalanceConfig
from eplb_fsm.placement.placement import Placement
from eplb_fsm.runtime.bank import Bank
from eplb_fsm.runtime.maps import TensorMapWriter

_CONSTANT = (RebalanceConfig, Placement, Bank)
"""Not changed after they were made. The tensors of a bank are found on the engine that owns them."""
_ONLY_MEMORY = (TensorMapWriter,)
"""Of these only the tensors change."""
_MODULES = ("eplb_fsm.", "threading")
"""Where the classes of parts come from; of the second one only events are used."""
_CONTAINERS = frozenset({list, dict, set, deque})


class Parts:
    """All parts of a run that can change: what can be reached from it, found once.

    Args:
        root: The run, just made. Parts that it gets later are not saved.
    """

    def __init__(self, root: object) -> None:
        self.attributes: list[dict[str, Any]] = []
        """Of each object that has a dictionary of them."""
        self.slotted: list[tuple[Any, list[str]]] = []
        """Each object that has slots instead, with their names."""
        self.queues: list[queue.SimpleQueue[Any]] = []
        storages: dict[int, torch.UntypedStorage] = {}
        seen: set[int] = set()
        pending: list[Any] = [root]
        while pending:
            part = pending.pop()
            if id(part) in seen or isinstance(part, _CONSTANT):
                continue
            seen.add(id(part))
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage
            elif isinstance(part, queue.SimpleQueue):
                self.queues.append(part)
            elif isinstance(part, (list, tuple, set, deque)):
                pending += part
            elif isinstance(part, dict):
                pending += part.values()
            elif type(part).__module__.startswith(_MODULES):
                pending += _attributes(part).values()
                if not _is_frozen(type(part)) and not isinstance(part, _ONLY_MEMORY):
                    self._add(part)
        self.memory = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]
        """The bytes of every tensor, once however many views there are of them."""

    def _add(self, part: Any) -> None:
        if hasattr(part, "__dict__"):
            self.attributes.append(part.__dict__)
        else:
            self.slotted.append((part, _slots(type(part))))


class Snapshot:
    """What all parts hold now.

    Args:
        parts: The parts.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._attributes = [(now, dict(now)) for now in parts.attributes]
        self._slotted = [(part, {name: getattr(part, name) for name in names}) for part, names in parts.slotted]
        containers = {
            id(value): value
            for _, attributes in [*self._attributes, *self._slotted]
            for value in attributes.values()
            if type(value) in _CONTAINERS
        }
        self._contents = [(container, _copied(container)) for container in containers.values()]
        self._messages = [_taken(mailbox) for mailbox in parts.queues]
        self._refill_queues()
        self._bytes = torch.split(torch.cat(parts.memory), [part.numel() for part in parts.memory])

    def restore(self) -> None:
        """Put everything back; as often as wanted."""
        for now, attributes in self._attributes:
            now.clear()
            now.update(attributes)
        for part, attributes in self._slotted:
            for name, value in attributes.items():
                setattr(part, name, value)
        for container, content in self._contents:
            if container or content:
                _refill(container, _copied(content))
        for mailbox in self._parts.queues:
            _taken(mailbox)
        self._refill_queues()
        torch._foreach_copy_(self._parts.memory, self._bytes)

    def _refill_queues(self) -> None:
        for mailbox, messages in zip(self._parts.queues, self._messages, strict=True):
            for message in messages:
                mailbox.put(message)


def _attributes(part: Any) -> dict[str, Any]:
    """Return the attributes of an object by name."""
    if hasattr(part, "__dict__"):
        return dict(part.__dict__)
    return {name: getattr(part, name) for name in _slots(type(part))}


def _slots(kind: type) -> list[str]:
    return [name for base in kind.__mro__ for name in base.__dict__.get("__slots__", ())]


def _is_frozen(kind: type) -> bool:
    """Whether objects of a class cannot change: frozen dataclasses and named tuples."""
    parameters = getattr(kind, "__dataclass_params__", None)
    return issubclass(kind, tuple) or (parameters is not None and parameters.frozen)


def _copied(container: Any) -> Any:
    """Copy a container, with the containers in it if its first element is one."""
    if isinstance(container, dict):
        if container and type(next(iter(container.values()))) in _CONTAINERS:
            return {key: _copied(value) for key, value in container.items()}
        return dict(container)
    if container and type(next(iter(container))) in _CONTAINERS:
        return type(container)(map(_copied, container))
    return container.copy()


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)


def _taken(mailbox: queue.SimpleQueue[Any]) -> list[Any]:
    """Take everything out of a queue."""
    messages = []
    while not mailbox.empty():
        messages.append(mailbox.get_nowait())
    return messages
