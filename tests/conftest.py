"""Every test: no deadline for hypothesis, whose examples take as long as the machine is busy; one thread for each of
several processes (`pytest -n 2`), which would otherwise wait for each other's."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
