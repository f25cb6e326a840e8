"""A hub on 127.0.0.1 for the tests of this folder, and no way to any other machine."""

from tests.helpers.hub import fresh, guarded, hub, lora, running, waits  # noqa: F401
from tests.helpers.pushes import adapter  # noqa: F401
