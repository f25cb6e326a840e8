"""Broken adapter and model folders, made by code from a seed, through every command: `python -m tests.fuzz`."""
