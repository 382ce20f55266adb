"""What holds for all tests: no property fails because the machine was slow, or, where a change is judged, by chance."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "repeatable", settings.get_profile("patient"), derandomize=True
)  # the same examples each time
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "patient"))

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
