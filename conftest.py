"""The suites' options and fixtures come from the package's own plugin, so that an installed copy has them too."""

import sys

_PLUGIN = "specdecode.bench.plugin"

# Where the package is installed, pytest has loaded its plugin by now.
if _PLUGIN not in sys.modules:
    pytest_plugins = [_PLUGIN]
