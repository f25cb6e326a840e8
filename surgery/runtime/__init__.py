"""The PEFT side of our own adapter types: one tuner and one layer class for all of them, and loading."""

import surgery.methods as _methods  # noqa: F401 - imports peft before any module of this package is half imported
