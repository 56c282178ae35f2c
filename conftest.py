"""The suites' options and fixtures, loaded from the package's plugin, so that an installed copy has them too."""

import sys

_PLUGIN = "specdecode.bench.plugin"

# If the package is installed, pytest has already loaded the plugin.
if _PLUGIN not in sys.modules:
    pytest_plugins = [_PLUGIN]
