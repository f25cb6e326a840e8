"""Rules of the house that no general linter knows: `python -m tests.lint`, part of `make lint`."""
