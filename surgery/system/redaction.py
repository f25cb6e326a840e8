"""Messages without tokens, signatures and credentials."""

from __future__ import annotations

import re

__all__ = ["redacted"]

TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}\b")

# Addresses of storage services carry their own password.
SIGNATURE = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]+")

CREDENTIALS = re.compile(r"(https?://)[^\s/@'\"]+@")


def redacted(text: str, token: str | None = None) -> str:
    """A message without tokens, without the signatures of addresses, and without names and passwords in them."""
    if token:
        text = text.replace(token, "***")
    text = CREDENTIALS.sub(r"\1", TOKEN.sub("***", text))
    return SIGNATURE.sub(r"\1", text)
