"""Mutation check: formulas are broken one at a time, and the tests must notice.

`python -m tests.mutation` works on a private copy of the package, never on the working tree.
"""
