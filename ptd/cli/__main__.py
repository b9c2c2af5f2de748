"""``python -m ptd.cli``: how launchers and job scripts start ranks."""

from ptd.cli import main

main()
