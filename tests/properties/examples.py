"""What the properties are drawn from: adapters in memory, and their weight changes by definition in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from surgery.adapters.adapter import Adapter

MODEL = "base_model.model."


def examples(count: int) -> settings:
    """So many examples, the same in every run."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


@dataclass(frozen=True)
class Layer:
    """One layer of a drawn LoRA: its size, its rank, and how fast its spectrum falls from rank to rank."""

    out: int
    width: int
    rank: int
    falls: float = 0.5
    size: float = 1.0


LAYERS = st.builds(
    Layer,
    out=st.integers(1, 24),
    width=st.integers(1, 24),
    rank=st.integers(1, 6),
    falls=st.sampled_from([0.4, 0.7, 1.0]),
    size=st.sampled_from([0.0, 0.1, 1.0, 1.0]),
)
SEEDS = st.integers(0, 2**16)


def name_of(index: int) -> str:
    return f"blocks.{index}.fc"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lora(layers: Sequence[Layer], seed: int = 0, alpha: float = 8.0, dtype: torch.dtype = torch.float32) -> Adapter:
    """A LoRA whose factors are Gaussian, with columns of falling size."""
    draws = generator(seed)
    pairs = []
    for layer in layers:
        falling = layer.size * layer.falls ** torch.arange(layer.rank)
        B = torch.randn(layer.out, layer.rank, generator=draws) * falling
        pairs.append((B, torch.randn(layer.rank, layer.width, generator=draws)))
    return lora_of(pairs, alpha, dtype)


def lora_of(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], alpha: float = 8.0, dtype: torch.dtype = torch.float32
) -> Adapter:
    """A LoRA of given factors `B (out, r)` and `A (r, in)`."""
    tensors, ranks = {}, {}
    for index, (B, A) in enumerate(pairs):
        name = f"{MODEL}{name_of(index)}.lora_"
        tensors[f"{name}A.weight"], tensors[f"{name}B.weight"] = A.to(dtype), B.to(dtype)
        ranks[name_of(index)] = A.shape[0]
    config = {
        "peft_type": "LORA",
        "r": 1,
        "rank_pattern": ranks,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
    }
    return Adapter(config, tensors)


def change_of(adapter: Adapter, module: str, shape: tuple[int, int]) -> torch.Tensor:
    """The weight change of one layer by the definition of the adapter's type, float64; zeros for a layer it lacks.

    Types: LORA, VERA, GIVA without split, INILORA.
    """
    out, width = shape
    tensors = {name.removeprefix("base_model."): value.double() for name, value in adapter.tensors.items()}
    own = {name.removeprefix(f"model.{module}."): value for name, value in tensors.items() if f".{module}." in name}
    config: Any = adapter.config
    if not own:
        return torch.zeros(shape, dtype=torch.float64)
    if adapter.peft_type == "LORA":
        alpha = (config.get("alpha_pattern") or {}).get(module, config["lora_alpha"])
        A, B = own["lora_A.weight"], own["lora_B.weight"]
        return B @ A * (alpha / A.shape[0])
    if adapter.peft_type == "VERA":
        b, d = own["vera_lambda_b"], own["vera_lambda_d"]
        return torch.diag(b) @ tensors["vera_B"][:out] @ torch.diag(d) @ tensors["vera_A"][:, :width]
    if adapter.peft_type == "GIVA":
        return torch.diag(own["giva_o"]) @ own["giva_B"] @ torch.diag(own["giva_s"]) @ own["giva_A"]
    scale = config["lora_alpha"] / config["r"]
    return scale * (own["inilora_B"] @ own["inilora_A"] - own["inilora_B0"] @ own["inilora_A0"])


def changes_of(adapter: Adapter, layers: Sequence[Layer]) -> list[torch.Tensor]:
    """All layers' changes."""
    return [change_of(adapter, name_of(i), (layer.out, layer.width)) for i, layer in enumerate(layers)]


def relative_error(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Root of the summed squared differences over that of the summed squares; 0 where nothing is wanted."""
    lost = sum(float((a - b).square().sum()) for a, b in zip(wanted, found, strict=True))
    whole = sum(float(a.square().sum()) for a in wanted)
    return (lost / whole) ** 0.5 if whole else 0.0


def spectrum_of(changes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Exact singular values of every change."""
    return [torch.linalg.svdvals(change) for change in changes]
