"""`python -m vlaopt`: the command line."""

from vlaopt.cli import main

main()
