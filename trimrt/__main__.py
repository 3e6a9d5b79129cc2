"""`python -m trimrt`: the same as the `trimrt` command."""

from trimrt.cli import main

main()
