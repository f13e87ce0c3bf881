"""Starting a serving engine with the one flag that its own command line does not take."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from eplb_fsm.engines.switch import FLAG, VARIABLE
from eplb_fsm.errors import ConfigError

_MODULES = {"sglang": "sglang.launch_server", "vllm": "vllm.entrypoints.cli.main"}
"""What ``python -m`` runs for each engine."""
_PLUGIN = "eplb_fsm"
_ALLOWED_PLUGINS = {"sglang": "SGLANG_PLUGINS", "vllm": "VLLM_PLUGINS"}
"""Each engine's variable that names, with commas, the only plugins that it loads."""


class Serve(NamedTuple):
    """A process to become.

    Attributes:
        command: Its arguments, program first.
        environ: Its variables.
    """

    command: list[str]
    environ: dict[str, str]


def make_serve(engine: str, arguments: Sequence[str], environ: Mapping[str, str]) -> Serve:
    """Take the flag out of an engine's arguments, and pass it on as a variable, which the engine's processes inherit.

    Args:
        engine: "sglang" or "vllm".
        arguments: The engine's own, with or without ``--enable-eplb-rebalance-async``.
        environ: Usually ``os.environ``.

    Raises:
        ConfigError: The engine is not installed, or would not load the plugin.
    """
    if find_spec(engine) is None:
        raise ConfigError(f"{engine} is not installed beside eplb-fsm: pip install {engine}")
    passed = [argument for argument in arguments if argument != FLAG]
    variables = dict(environ)
    if len(passed) < len(arguments):
        variable = _ALLOWED_PLUGINS[engine]
        allowed = environ.get(variable)
        if allowed is not None and _PLUGIN not in [name.strip() for name in allowed.split(",")]:
            raise ConfigError(
                f"{variable} = {allowed!r} keeps {engine} from loading the plugin that {FLAG} needs; add {_PLUGIN} to "
                "it, or unset it"
            )
        variables[VARIABLE] = "1"
    return Serve([sys.executable, "-m", _MODULES[engine], *passed], variables)
