"""Fixtures of the tests of this folder."""

from tests.helpers.inspections import lora  # noqa: F401
