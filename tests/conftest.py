"""Hypothesis profiles, and which tests may run side by side.

HYPOTHESIS_PROFILE chooses a profile; else it is `ci` where CI is set, and `dev` elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_STARTS_PROCESSES = ("dist", "engines", "faults")

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


def pytest_itemcollected(item: pytest.Item) -> None:
    """Under pytest-xdist: tests of real processes one after the other, since they fill the cores; others by file."""
    if item.config.pluginmanager.hasplugin("xdist"):
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        group = "processes" if folder in _STARTS_PROCESSES else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
