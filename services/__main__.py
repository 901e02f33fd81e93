"""`python -m services`: the command line, for whoever starts it by the interpreter."""

from services.cli import main

main()
