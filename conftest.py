"""The suites' options and fixtures come from the package's own plugin, so that an installed copy has them too."""

pytest_plugins = ["specdecode.bench.plugin"]
