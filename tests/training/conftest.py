"""Fixtures of the tests of this folder."""

from tests.helpers.training_distilled import packed, taught_place  # noqa: F401
from tests.helpers.training_resumed import begun_place  # noqa: F401
from tests.helpers.training_trained import trained_place  # noqa: F401
