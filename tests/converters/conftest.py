"""Fixtures of the tests of this folder."""

from tests.helpers.conversions import lora  # noqa: F401
