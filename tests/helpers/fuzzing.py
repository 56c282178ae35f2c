"""Settings of Hypothesis for all tests. `pytest --hypothesis-profile=fuzz` runs 2,000 examples of each fuzzing test."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

# The time of an example shows how busy the machine is, not whether the code is right.
settings.register_profile("usual", deadline=None)
settings.load_profile("usual")
_USUAL = settings.default.max_examples
settings.register_profile("fuzz", max_examples=2000, print_blob=True)


def fuzzed(few: int, **others: Any) -> settings:
    """Return the settings of a fuzzing test: few examples, or as many as the profile asks for."""
    asked = settings.default.max_examples
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(max_examples=few if asked == _USUAL else asked, suppress_health_check=slow, **others)
