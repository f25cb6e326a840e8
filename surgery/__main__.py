"""`python -m surgery` is `surgery`."""

from surgery.cli import main

if __name__ == "__main__":
    main()
