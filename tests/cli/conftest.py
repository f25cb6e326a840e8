"""Fixtures of the tests of commands: what the tests of the library calls use."""

from tests.helpers.comparisons import pair, texts  # noqa: F401
from tests.helpers.hub import fresh, guarded, hub, running, waits  # noqa: F401
from tests.helpers.init_runs import texted_llama  # noqa: F401
from tests.helpers.inspections import lora  # noqa: F401
from tests.helpers.pushes import adapter  # noqa: F401
from tests.helpers.training_trained import trained_place  # noqa: F401
