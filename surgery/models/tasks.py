"""The table of tasks, readable without torch."""

from __future__ import annotations

from typing import Literal

__all__ = ["TASK_TABLE", "TaskName"]

TaskName = Literal[
    "causal-lm",
    "seq2seq-lm",
    "seq-cls",
    "token-cls",
    "question-answering",
    "masked-lm",
    "image-cls",
    "feature-extraction",
]

# Task on the command line -> PEFT's task type, and transformers' table of model classes. PEFT knows no type for the
# last three: its generic wrapper passes everything through.
TASK_TABLE: dict[str, tuple[str | None, str]] = {
    "causal-lm": ("CAUSAL_LM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "seq2seq-lm": ("SEQ_2_SEQ_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    "seq-cls": ("SEQ_CLS", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "token-cls": ("TOKEN_CLS", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"),
    "question-answering": ("QUESTION_ANS", "MODEL_FOR_QUESTION_ANSWERING_MAPPING"),
    "masked-lm": (None, "MODEL_FOR_MASKED_LM_MAPPING"),
    "image-cls": (None, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    "feature-extraction": (None, "MODEL_MAPPING"),
}
