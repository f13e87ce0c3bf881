"""Hypothesis profiles: HYPOTHESIS_PROFILE chooses one; else `ci` where CI is set, and `dev` elsewhere."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

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
