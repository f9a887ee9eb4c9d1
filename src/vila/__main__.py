"""`python -m vila` is the `vila` command; `torchrun -m vila train ...` needs it."""

from vila.cli.main import main

if __name__ == "__main__":
    main()
