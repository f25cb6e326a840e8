"""Fixtures of the tests of this folder."""

from tests.helpers.comparisons import classifiers, pair, texts  # noqa: F401
