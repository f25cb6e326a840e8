"""Fingerprints recognise a base in every dtype it is loaded in, and nothing else."""

from __future__ import annotations

import torch

from surgery.models.fingerprint import Fingerprint, matches


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(6, 4, generator=generator) for i in range(3)}


def digests(values: dict[str, torch.Tensor]) -> dict[str, str]:
    fingerprint = Fingerprint()
    for key in sorted(values, reverse=True):
        fingerprint.add(key, values[key])
        fingerprint.add(key, values[key])
    return fingerprint.digests()


def cast(values: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: value.to(dtype) for key, value in values.items()}


def test_every_dtype_of_the_same_base_matches() -> None:
    base = weights()
    expected = digests(base)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert matches(expected, cast(base, dtype)), dtype
    # Rounded, then widened again.
    assert matches(expected, cast(cast(base, torch.bfloat16), torch.float32))
    assert matches(expected, cast(cast(base, torch.float16), torch.float32))


def test_a_half_precision_checkpoint_opened_wider() -> None:
    base = cast(weights(), torch.bfloat16)
    assert matches(digests(base), base)
    assert matches(digests(base), cast(base, torch.float32))


def test_a_halved_model_that_keeps_a_layer_in_float32() -> None:
    """As transformers does with T5's wo."""
    base = weights()
    for half in (torch.float16, torch.bfloat16):
        mixed = {key: value if key == "layer.2" else value.to(half) for key, value in base.items()}
        assert matches(digests(base), mixed)
        mixed["layer.0"] = mixed["layer.0"] * 2
        assert not matches(digests(base), mixed)


def test_other_weights_do_not_match() -> None:
    expected = digests(weights())
    assert not matches(expected, weights(1))
    nudged = weights()
    nudged["layer.1"][2, 3] += 1e-6
    assert not matches(expected, nudged)
    renamed = {key.replace("layer", "block"): value for key, value in weights().items()}
    assert not matches(expected, renamed)
    assert not matches(expected, {k: v for k, v in weights().items() if k != "layer.2"})


def test_memory_order_does_not_matter() -> None:
    base = weights()
    transposed = {key: value.T.contiguous().T for key, value in base.items()}
    assert matches(digests(base), transposed)
