"""SGLang is too large to be installed for every test run; see scripts/test-sglang."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("sglang") else ["test_*.py"]
