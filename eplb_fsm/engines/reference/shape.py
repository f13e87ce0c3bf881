"""What of a model must be known before a rank is started: its shape, read from its `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from eplb_fsm.errors import ConfigError
from eplb_fsm.placement.placement import Placement


class ModelShape(NamedTuple):
    """Layers and experts of a model; every layer is an MoE layer."""

    num_moe_layers: int
    num_logical_experts: int

    def check_ranks(self, ranks: int) -> None:
        """Raise :class:`ConfigError` unless so many ranks can each hold an expert."""
        if not 1 <= ranks <= self.num_logical_experts:
            raise ConfigError(
                f"{ranks} ranks: the model has {self.num_logical_experts} experts a layer, so run 1 to "
                f"{self.num_logical_experts} ranks"
            )

    def fitting_redundancy(self, wanted: int, ranks: int) -> int:
        """Return the smallest number of redundant experts from `wanted` that divides evenly over the ranks."""
        return wanted + -(self.num_logical_experts + wanted) % ranks

    def first_placement(self, redundant: int, ranks: int, file: Path | None = None) -> Placement:
        """Return the placement of a file, or the one of an engine that has not rebalanced yet.

        Raises:
            PlacementError: The file cannot be read or does not fit.
            ConfigError: The experts do not divide evenly over the ranks.
        """
        layers, experts = self
        if (experts + redundant) % ranks:
            raise ConfigError(
                f"{experts} experts and {redundant} redundant ones do not divide evenly over {ranks} ranks: "
                f"use {self.fitting_redundancy(redundant, ranks)} redundant experts, or other ranks"
            )
        initial = Placement.initial(layers, experts, experts + redundant, ranks)
        return initial if file is None else Placement.load(file, like=initial)


def read_shape(folder: Path) -> ModelShape:
    """Return the shape of the model in a folder.

    Raises:
        ConfigError: There is no model that this engine can run.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return ModelShape(int(config["num_hidden_layers"]), int(config["num_experts"]))
    except OSError as error:
        raise ConfigError(f"no model in {folder}: {path.name} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the configuration of a Qwen3-MoE model ({error})") from error
