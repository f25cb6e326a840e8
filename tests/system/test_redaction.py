"""Messages are redacted."""

from __future__ import annotations

from surgery.system.redaction import redacted
from tests.helpers.secrets import OTHER_TOKEN


def test_messages_are_redacted() -> None:
    text = f"PUT https://ada:{OTHER_TOKEN}@host/a?X-Amz-Signature=secret&b=c failed with {OTHER_TOKEN}, own-token"
    assert redacted(text, "own-token") == "PUT https://host/a failed with ***, ***"
    assert redacted("hf_hub and hf_xet stay") == "hf_hub and hf_xet stay"
