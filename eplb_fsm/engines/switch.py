"""The switch that turns rebalancing in the background on in an engine that starts without this library's flags."""

from __future__ import annotations

from collections.abc import Mapping

from eplb_fsm.errors import ConfigError

FLAG = "--enable-eplb-rebalance-async"
VARIABLE = "ENABLE_EPLB_REBALANCE_ASYNC"
"""The flag's name as a variable, which processes that the engine starts inherit."""

_ON = ("1", "true", "yes", "on")
_OFF = ("", "0", "false", "no", "off")


def is_asked(environ: Mapping[str, str]) -> bool:
    """Return whether the variable asks for it.

    Raises:
        ConfigError: It says something else than yes or no.
    """
    value = environ.get(VARIABLE, "").strip().lower()
    if value in _ON:
        return True
    if value in _OFF:
        return False
    raise ConfigError(f"{VARIABLE} = {value!r}: set it to 1 to rebalance in the background, or to 0")
