"""Fixtures of the tests of this folder."""

from tests.helpers.conversions import lora  # noqa: F401
from tests.helpers.inner_folders import pair  # noqa: F401
