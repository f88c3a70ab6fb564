"""`python -m appo` is the same as the `appo` command."""

from appo.cli import main

if __name__ == "__main__":
    main()
