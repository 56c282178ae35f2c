"""Collection of the harness tests. The harness is installed in one environment only: `tox -e harness`."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("lm_eval") else ["test_harness.py"]
