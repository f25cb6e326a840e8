"""The folders of the tests of security."""

from tests.security.conftest import folders, whole

__all__ = ["folders", "whole"]
