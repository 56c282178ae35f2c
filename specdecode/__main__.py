"""`python -m specdecode`: the command line from a checkout that is not installed."""

from specdecode.cli import main

main()
