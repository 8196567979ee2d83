"""Flower and Ray: the strategy, the two apps, and the simulation that runs them.

Nothing outside this package imports Ray, or any of Flower but the names of its public API by which
`fedpriv.flower_app` and `fedpriv.audit` are handed a grid, and `fedpriv.flower` somebody's own
strategy.
"""

import os

# Both libraries read these when they are imported. A privacy tool does not phone home, and Ray
# must not hide the GPUs of a process that asked for none. Whoever sets them otherwise wins.
for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_name, _value)
