"""Fixtures of the tests of this folder."""

from tests.helpers.batches import loras  # noqa: F401
from tests.helpers.conversions import headed, lora, text_llama  # noqa: F401
from tests.helpers.vera_cases import calibration, vera_lora  # noqa: F401
