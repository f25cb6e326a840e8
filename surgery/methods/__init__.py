"""One module per adapter method: its weight change, its start, its PEFT configuration, its parameter names."""

# First of all, because importing peft is what makes our types known to it (see surgery/__init__.py): that needs the
# modules of this package whole, not half imported.
import peft as _peft  # noqa: F401
