"""Loads the suite's plugin and Hypothesis' profile: both have to be known before anything is collected.

Profiles, by HYPOTHESIS_PROFILE or --hypothesis-profile: "ci" (the default) tries the same examples every time, "long"
twenty times as many, others every time.
"""

import os

from hypothesis import HealthCheck, settings

pytest_plugins = ["suite.plugin"]

# No deadlines and no complaints about slow examples: the machine may be busy.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("ci", max_examples=100, derandomize=True, database=None, **COMMON)
settings.register_profile("long", max_examples=2000, derandomize=False, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
