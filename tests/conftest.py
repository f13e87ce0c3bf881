"""Hypothesis profiles, and which tests may run side by side.

HYPOTHESIS_PROFILE chooses a profile; else it is `ci` where CI is set, and `dev` elsewhere.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

_STARTS_PROCESSES = ("dist", "engines", "faults", "serving")

# A run of a whole cluster takes longer than Hypothesis expects of an example, and machines differ.
_WHOLE_CLUSTERS = (HealthCheck.too_slow, HealthCheck.data_too_large)

settings.register_profile("dev", deadline=None, suppress_health_check=_WHOLE_CLUSTERS, max_examples=30)
settings.register_profile(
    "ci",
    deadline=None,
    suppress_health_check=_WHOLE_CLUSTERS,
    max_examples=300,
    derandomize=True,
    print_blob=True,
)
settings.register_profile(
    "nightly", deadline=None, suppress_health_check=_WHOLE_CLUSTERS, max_examples=3000, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """With pytest-xdist: tests of real processes one after the other, since they fill the cores; others by file."""
    return _ByFile(config, log)


class _ByFile(LoadScopeScheduling):
    """What one worker runs as a whole."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "processes" if path.split("/")[1] in _STARTS_PROCESSES else path
