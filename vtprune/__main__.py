"""`python -m vtprune`."""

from vtprune.cli import main

if __name__ == "__main__":
    main()
