"""Settings of the types that are read through PEFT, small enough for tiny layers."""

from __future__ import annotations

from typing import Any

import peft

__all__ = ["KINDS"]

# Name -> its configuration class, and its settings besides the targets.
KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "C3A": (peft.C3AConfig, {"block_size": 16}),
    "DEFT": (peft.DeftConfig, {"r": 4}),
    "DELORA": (peft.DeloraConfig, {"r": 4, "rank_pattern": {"k_proj": 2, "value": 2}}),
    "FOURIERFT": (peft.FourierFTConfig, {"n_frequency": 30}),
    "GRALORA": (peft.GraloraConfig, {"r": 4, "gralora_k": 2}),
    "MISS": (peft.MissConfig, {"r": 4}),
    "MISS bat": (peft.MissConfig, {"r": 4, "init_weights": "bat"}),
    "MISS mini": (peft.MissConfig, {"r": 4, "mini_r": 4, "init_weights": "mini"}),
    "PEANUT": (peft.PeanutConfig, {"r": 4}),
    "PSOFT": (peft.PsoftConfig, {"r": 4}),
    "ROAD": (peft.RoadConfig, {"group_size": 16}),
    "SHIRA": (peft.ShiraConfig, {"r": 4}),
    "VBLORA": (peft.VBLoRAConfig, {"r": 4, "num_vectors": 32, "vector_length": 16}),
    "VBLORA topk": (
        peft.VBLoRAConfig, {"r": 4, "num_vectors": 32, "vector_length": 16, "save_only_topk_weights": True}
    ),
    "WAVEFT": (peft.WaveFTConfig, {"n_frequency": 30}),
}  # fmt: skip
