"""The version, readable by the build without an import."""

__version__ = "0.2.0.dev0"
