"""Fixtures of the tests of this folder."""

from tests.helpers.inner_folders import pair  # noqa: F401
