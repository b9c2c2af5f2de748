"""Run the command line as ``python -m ptd.cli``, as launchers and job scripts do to start ranks."""

from ptd.cli import main

main()
