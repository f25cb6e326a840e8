"""Fingerprints recognise a base in every dtype it is loaded in, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import surgery
from surgery.errors import AdapterError, WrongBaseError
from surgery.models.fingerprint import Fingerprint, matches
from tests.helpers.bad_input import check_words, configure_adapter, tensor
from tests.helpers.models import load_base, save_model


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


DEPENDS_ON_BASE = [
    ("frod", {}),
    ("frod", {"store_bases": False}),
    ("smoa", {}),
    ("inilora", {"store_bases": False}),
]


@pytest.fixture(scope="module")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return save_model("llama", tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "options"), DEPENDS_ON_BASE)
def test_wrong_base(method: str, options, dtype, llama: Path, other_llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, method, tmp_path / "out", **options)
    with pytest.raises(WrongBaseError) as caught:
        PeftModel.from_pretrained(load_base(other_llama, dtype), tmp_path / "out")
    check_words(("'default'", "made from other base weights", str(llama)), str(caught.value), tmp_path)


def test_wrong_base_by_load(llama: Path, other_llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "frod", tmp_path / "out")
    with pytest.raises(WrongBaseError, match="other base weights"):
        surgery.load(tmp_path / "out", other_llama)


def test_one_changed_weight_is_a_wrong_base(model: Path, llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "smoa", tmp_path / "out")
    tensor(lambda weight: weight + torch.eye(32) * 1e-6)(model)
    with pytest.raises(WrongBaseError):
        PeftModel.from_pretrained(load_base(model), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["frod", "smoa"])
def test_same_base_rounded_is_accepted(method: str, dtype, llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, method, tmp_path / "out")
    PeftModel.from_pretrained(load_base(llama, dtype), tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"store_bases": True}])
def test_inilora_with_stored_bases_opens_on_any_base(options, llama: Path, other_llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "inilora", tmp_path / "out", **options)
    PeftModel.from_pretrained(load_base(other_llama), tmp_path / "out")


@pytest.mark.parametrize("method", ["frod", "inilora"])
def test_bases_regenerated_from_a_rounded_base(method: str, llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, method, tmp_path / "out", store_bases=False)
    with pytest.raises(WrongBaseError, match="bfloat16"):
        PeftModel.from_pretrained(load_base(llama, torch.bfloat16), tmp_path / "out")


@pytest.mark.parametrize("setting", [None, {}])
def test_adapter_without_fingerprint(setting, llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "frod", tmp_path / "out")
    configure_adapter(base_fingerprint=setting)(tmp_path / "out")
    with pytest.raises(AdapterError, match="lacks base_fingerprint"):
        PeftModel.from_pretrained(load_base(llama), tmp_path / "out")
