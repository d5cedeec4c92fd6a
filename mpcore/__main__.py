"""`python -m mpcore`: the program `mpcore`, where its folder is not on the PATH."""

from mpcore.cli import main

main()
