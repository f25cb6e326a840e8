"""A token of somebody else."""

from __future__ import annotations

OTHER_TOKEN = "hf_abcdefghijABCDEFGHIJabcdefghijAB12"
