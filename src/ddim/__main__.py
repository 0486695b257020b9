"""`python -m ddim`."""

from ddim.cli.main import main

main()
