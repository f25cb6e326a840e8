"""Fixtures of the tests of this folder."""

from tests.helpers.hooked import tied  # noqa: F401
