"""The harness is installed in one environment only (`tox -e harness`): elsewhere its tests are not collected."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("lm_eval") else ["test_harness.py"]
