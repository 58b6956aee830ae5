"""`python -m medvisionllama` is the command line."""

from medvisionllama.cli.main import main

main()
