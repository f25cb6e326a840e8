"""SMoA as published, diagonal spectral blocks: against its definition in float64; files, PEFT, merging, converting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import surgery
from surgery.adapters.adapter import Adapter
from surgery.deltas.blocks import MANY_TOKENS
from surgery.errors import AdapterError, MethodError, WrongBaseError
from surgery.methods import smoa
from surgery.methods.smoa import SmoaConfig, split_rank
from tests.helpers.models import edit_tensors, load_base, model_inputs, output, relative_difference, save_model
from tests.helpers.smoa_reference import block_change, parts_of

WEIGHTS = "adapter_model.safetensors"
LLAMA_LAYERS = ("model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj")


def moved(model: Any) -> Any:
    """Factors that are no longer at their start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "smoa_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def trained(folder: Path, out: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A loaded adapter whose factors have moved."""
    surgery.init(folder, "smoa", out, **options)
    return moved(PeftModel.from_pretrained(load_base(folder, dtype), out, is_trainable=True).eval())


def weight_of(layer: Any) -> torch.Tensor:
    weight = layer.linear.weight.detach().double()
    return weight.T if layer.fan_in_fan_out else weight


def in_the_weights_order(W: torch.Tensor, groups: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The blocks, with A's columns and B's rows as they lie in the weight."""
    return [(rows.sort().values, columns.sort().values) for rows, columns in parts_of(W, groups)]


def expected(layer: Any, ranks: list[int], scale: float) -> torch.Tensor:
    """`dW` from the definition."""
    W = weight_of(layer)
    A, B = (getattr(layer, name)["default"].detach().double() for name in ("smoa_A", "smoa_B"))
    parts = in_the_weights_order(W, len(ranks))
    factors, start = [], 0
    for (rows, columns), rank in zip(parts, ranks, strict=True):
        factors.append((B[: len(rows), start : start + rank], A[start : start + rank, : len(columns)]))
        start += rank
    return block_change(W, parts, factors, scale)


@pytest.mark.parametrize(
    ("options", "ranks", "scale"),
    [
        ({"rank": 6}, [3, 3], 1.0),
        ({"rank": 7, "groups": 3, "alpha": 14}, [3, 2, 2], 2.0),
        ({"rank": 3, "groups": 1, "alpha": 1.5}, [3], 0.5),
        ({"rank": 9, "groups": 5}, [2, 2, 2, 2, 1], 1.0),
        ({"branch_ranks": [5, 0, 1]}, [5, 0, 1], 1.0),
        ({"rank": 40}, [20, 20], 1.0),
    ],
)
def test_change_and_output_follow_the_definition(
    options: dict[str, Any], ranks: list[int], scale: float, llama: Path, tmp_path: Path
) -> None:
    model = trained(llama, tmp_path / "out", **options)
    reference = load_base(llama)
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "smoa_A"):
            change = expected(layer, ranks, scale)
            assert torch.allclose(layer.get_delta_weight("default").double(), change, atol=1e-5)
            reference.get_submodule(name).weight.data += change.float()
    inputs = model_inputs("llama")
    with torch.no_grad():
        assert relative_difference(output(model, inputs), output(reference, inputs)) < 1e-4
        assert relative_difference(output(model, inputs), output(load_base(llama), inputs)) > 1e-2


def test_layers_that_store_their_weight_transposed(model_folder, tmp_path: Path) -> None:
    model = trained(model_folder("gpt2"), tmp_path / "out", rank=5, groups=3)
    layers = [layer for layer in model.modules() if hasattr(layer, "smoa_A")]
    assert layers and all(layer.fan_in_fan_out for layer in layers)
    for layer in layers:
        found = layer.get_delta_weight("default").double().T
        assert torch.allclose(found, expected(layer, [2, 2, 1], 1.0), atol=1e-5)


@pytest.mark.parametrize("tokens", [3, MANY_TOKENS])
def test_gradients_are_those_of_the_definition(tokens: int, llama: Path, tmp_path: Path) -> None:
    """In training, of few tokens and of many: the base's part may be in the same product."""
    model = trained(llama, tmp_path / "out", rank=5).train()
    for name in LLAMA_LAYERS:
        layer = model.base_model.model.get_submodule(name)
        x = torch.randn(tokens, layer.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer(x).square().sum().backward()
        W, wide = weight_of(layer), x.detach().double().requires_grad_()
        A, B = (getattr(layer, each)["default"].detach().double().requires_grad_() for each in ("smoa_A", "smoa_B"))
        change, start = torch.zeros_like(W), 0
        for (rows, columns), rank in zip(in_the_weights_order(W, 2), [3, 2], strict=True):
            P, Q = torch.eye(W.shape[0]).double()[rows], torch.eye(W.shape[1]).double()[columns]
            update = (B[: len(rows), start : start + rank] @ A[start : start + rank, : len(columns)]) * (P @ W @ Q.T)
            change, start = change + P.T @ update @ Q, start + rank
        (wide @ (W + change).T).square().sum().backward()
        for found, wanted in ((x, wide), (layer.smoa_A["default"], A), (layer.smoa_B["default"], B)):
            assert relative_difference(found.grad, wanted.grad) < 1e-5
        model.zero_grad()


def test_one_group_is_hira_with_a_scale(llama: Path, tmp_path: Path) -> None:
    model = trained(llama, tmp_path / "out", rank=4, groups=1, alpha=2)
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    hira = get_peft_model(load_base(llama), HiraConfig(r=4, target_modules=targets)).eval()
    with torch.no_grad():
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "smoa_A"):
                twin = hira.base_model.model.get_submodule(name)
                twin.hira_A["default"].copy_(module.smoa_A["default"] * 0.5)
                twin.hira_B["default"].copy_(module.smoa_B["default"])
        inputs = model_inputs("llama")
        ours, theirs, base = output(model, inputs), output(hira, inputs), output(load_base(llama), inputs)
    assert relative_difference(ours, theirs) < 1e-5
    assert relative_difference(theirs, base) > 1e-2


def test_defaults_are_the_published_ones(llama: Path, tmp_path: Path) -> None:
    adapter, report = surgery.init(llama, "smoa", tmp_path / "out")
    config = adapter.config
    assert (config["r"], config["lora_alpha"], config["groups"], config["variant"]) == (32, 32, 2, "blocks")
    assert config["format_version"] == 2 and adapter.provenance["format_version"] == 2
    model = get_peft_model(load_base(llama), LoraConfig(r=32, target_modules=config["target_modules"]))
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert report.trainable_parameters == lora // 2
    assert sum("--variant components" in note for note in report.notes) == 1
    named = surgery.init(llama, "smoa", variant="blocks")[1]
    assert not any("--variant" in note for note in named.notes)
    assert surgery.methods.registry.method_info("smoa").learning_rate == 1e-3


def test_the_start_is_as_wide_as_a_linear_layers_own(llama: Path) -> None:
    """A_k uniform in +-1 / sqrt(|columns_k|), B zero; what pads the narrower blocks is zero."""
    adapter, _ = surgery.init(llama, "smoa", rank=40, groups=5, target=["q_proj", "down_proj"])
    for tensors in adapter.modules.values():
        A, width = tensors["smoa_A"], 32 if tensors["smoa_B"].shape[0] == 7 and tensors["smoa_A"].shape[1] == 7 else 48
        assert not tensors["smoa_B"].any()
        for number, size in enumerate(split_rank(width, 5)):
            block, bound = A[8 * number : 8 * number + 8, :size], size**-0.5
            assert 0.9 * bound < float(block.abs().max()) <= bound
            assert float(block.std()) == pytest.approx(bound / 3**0.5, rel=0.25)
            assert not A[8 * number : 8 * number + 8, size:].any()


def test_the_order_takes_a_bit_for_each_row_and_column(llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "smoa", tmp_path / "out", rank=4)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    orders = {name: tensor for name, tensor in tensors.items() if "smoa_A" not in name and "smoa_B" not in name}
    assert len(orders) == 21 and all(name.endswith(".smoa_order") for name in orders)
    up = orders["base_model.model.model.layers.0.mlp.up_proj.smoa_order"]  # 48 + 32 bits, 31 in a word
    assert up.dtype == torch.int32 and up.shape == (3,)


def test_a_load_decomposes_nothing_and_copies_no_weight(llama: Path, tmp_path: Path, monkeypatch) -> None:
    surgery.init(llama, "smoa", tmp_path / "out", rank=4)

    def refused(*_: Any) -> Any:
        raise AssertionError("a decomposition")

    monkeypatch.setattr(smoa, "spectral_scores", refused)
    for name in ("svd", "eigh", "qr", "svdvals", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, refused)
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "out")
    for layer in model.modules():
        if hasattr(layer, "smoa_A"):
            held = sum(b.numel() for b in layer.buffers()) - sum(b.numel() for b in layer.linear.buffers())
            assert held <= 2 * (layer.in_features + layer.out_features)
            assert layer.delta("default").whole.data_ptr() == layer.linear.weight.data_ptr()
    with torch.no_grad():
        inputs = model_inputs("llama")
        assert relative_difference(output(model, inputs), output(load_base(llama), inputs)) == 0


@pytest.mark.parametrize("store", [True, False])
def test_save_and_load_merge_and_convert_say_the_same(store: bool, llama: Path, tmp_path: Path) -> None:
    model = trained(llama, tmp_path / "start", rank=5, alpha=8, store_bases=store)
    model.save_pretrained(tmp_path / "saved")
    inputs = model_inputs("llama")
    with torch.no_grad():
        wanted = output(model, inputs)
        for opened in (
            PeftModel.from_pretrained(load_base(llama), tmp_path / "saved"),
            surgery.load(tmp_path / "saved", llama),
        ):
            assert torch.equal(output(opened.eval(), inputs), wanted)
        surgery.merge(tmp_path / "saved", llama, tmp_path / "merged")
        assert relative_difference(output(load_base(tmp_path / "merged"), inputs), wanted) < 1e-5
        _, report = surgery.convert(tmp_path / "saved", "lora", tmp_path / "lora", base=llama, energy=0.99)
        assert 0 < report.weight_error < 0.15
        lora = PeftModel.from_pretrained(load_base(llama), tmp_path / "lora").eval()
        assert relative_difference(output(lora, inputs), wanted) < 0.2
        merged = model.merge_and_unload()
        assert relative_difference(output(merged, inputs), wanted) < 1e-5


def test_regenerated_order_is_verified(llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "smoa", tmp_path / "out", rank=4, store_bases=False)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert not any("order" in name for name in tensors)
    PeftModel.from_pretrained(load_base(llama), tmp_path / "out")
    name = next(name for name in tensors if name.endswith("smoa_check"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(WrongBaseError, match="regenerated"):
        PeftModel.from_pretrained(load_base(llama), tmp_path / "out")
    with pytest.raises(WrongBaseError, match="regenerated"):
        surgery.merge(tmp_path / "out", llama, tmp_path / "merged")


def test_it_is_bound_to_its_base(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    surgery.init(base, "smoa", tmp_path / "out", rank=4)
    edit_tensors(base, lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].mul_(1.01))
    with pytest.raises(WrongBaseError):
        PeftModel.from_pretrained(load_base(base), tmp_path / "out")


@pytest.mark.parametrize("broken", ["words", "sizes"])
def test_a_broken_order_is_named(broken: str, llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "smoa", tmp_path / "out", rank=4)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    order = next(tensor for name, tensor in tensors.items() if name.endswith("smoa_order"))
    if broken == "words":
        order[-1] = 2**31 - 1
    else:
        order[0] ^= 1
    save_file(tensors, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="smoa_order"):
        PeftModel.from_pretrained(load_base(llama), tmp_path / "out")


def test_a_base_in_bfloat16(model_folder, tmp_path: Path) -> None:
    folder = model_folder("llama-bf16-sharded")
    model = trained(folder, tmp_path / "out", torch.bfloat16, rank=4)
    layer = model.base_model.model.get_submodule(LLAMA_LAYERS[0])
    assert layer.linear.weight.dtype == torch.bfloat16
    assert torch.allclose(layer.get_delta_weight("default").double(), expected(layer, [2, 2], 1.0), atol=1e-5)
    with torch.no_grad():
        assert output(model, model_inputs("llama")).isfinite().all()


def test_zero_and_rank_deficient_weights(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"].zero_()
        low = tensors["model.layers.0.mlp.up_proj.weight"]
        low.copy_(low[:, :2] @ low[:2])
        tensors["model.layers.0.mlp.down_proj.weight"][5:9] = 0

    edit_tensors(base, edit)
    model = trained(base, tmp_path / "out", rank=4)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        layer = model.base_model.model.get_submodule(name)
        change = expected(layer, [2, 2], 1.0)
        assert torch.allclose(layer.get_delta_weight("default").double(), change, atol=1e-5)
    layer = model.base_model.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.smoa_rows["default"].tolist() == list(range(32))  # all scores are zero: the order of the weight
    surgery.init(base, "smoa", tmp_path / "again", rank=4, store_bases=False)
    PeftModel.from_pretrained(load_base(base), tmp_path / "again")


def test_a_configuration_without_a_variant(llama: Path, tmp_path: Path) -> None:
    """One that starts an adapter makes blocks, a saved one is of 0.1.0 and means components."""
    fresh = get_peft_model(load_base(llama), SmoaConfig(r=4, target_modules=["q_proj"], dropout=0.1))
    fresh.save_pretrained(tmp_path / "fresh")
    config = json.loads((tmp_path / "fresh" / "adapter_config.json").read_text())
    assert config["variant"] == "blocks" and config["format_version"] == 2 and config["dropout"] == 0.1
    surgery.init(llama, "smoa", tmp_path / "old", rank=4, variant="components")
    path = tmp_path / "old" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["format_version"] == 1
    for name in ("variant", "lora_alpha", "branch_ranks"):
        config.pop(name)
    path.write_text(json.dumps(config))
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "old")
    assert model.peft_config["default"].variant == "components"
    assert set(Adapter.open(tmp_path / "old").modules[LLAMA_LAYERS[0]]) == {"smoa_A", "smoa_B", "smoa_cuts"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 2, "groups": 3}, "rank 2 .* 3 groups"),
        ({"rank": 40, "groups": 17}, "k_proj is 16 x 32: .*17 groups, give --groups 16"),
        ({"rank": 4, "branch_ranks": [1, 2]}, r"branch ranks \[1, 2\] are 2 with sum 3: 2 groups of rank 4"),
        ({"groups": 3, "branch_ranks": [1, 2]}, "branch ranks"),
        ({"branch_ranks": [3, -1]}, "at least 0"),
        ({"alpha": 0.0}, "alpha"),
        ({"variant": "vr"}, "blocks, components, not 'vr'"),
        ({"variant": "components", "alpha": 2.0}, "no lora_alpha"),
        ({"variant": "components", "branch_ranks": [2, 2]}, "no branch_ranks"),
        ({"variant": "components", "store_bases": False}, "--no-store-bases"),
        ({"rank": 2, "groups": 3, "variant": "components"}, "rank 2 .* 3 groups"),
    ],
)
def test_refusals(options: dict[str, Any], named: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=named):
        surgery.init(llama, "smoa", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_split_rank() -> None:
    assert split_rank(7, 3) == [3, 2, 2]
    assert split_rank(32, 2) == [16, 16]
