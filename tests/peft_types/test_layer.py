"""Our adapters behave in PEFT as its own do: several at once, merging, disabling, deleting, precision, dropout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale  # noqa: F401 - imports with our types registered
from peft.tuners.tuners_utils import BaseTunerLayer

import surgery
from surgery.deltas import blocks
from surgery.deltas.blocks import Blocks
from surgery.deltas.operators import Hadamard, InputMap
from surgery.methods.frod import FrodPortableConfig
from surgery.methods.inilora import IniloraConfig
from surgery.methods.smoa import SmoaConfig
from surgery.peft_types.layer import AdapterLayer
from tests.helpers.models import load_base, model_inputs, output, relative_difference

METHODS = ("inilora", "frod", "smoa", "smoa-components")
KINDS = ("llama", "gpt2")
SIZES: dict[str, dict[str, Any]] = {
    "inilora": {"r": 3, "lora_alpha": 6},
    "frod": {"sparse_rate": 0.05},
    "smoa": {"r": 4},
    "smoa-components": {"r": 4, "variant": "components"},
}
TARGETS = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def config_for(method: str, kind: str = "llama", **changes):
    """A PEFT configuration of one of our types, as a user of get_peft_model writes it."""
    classes = {"inilora": IniloraConfig, "frod": FrodPortableConfig, "smoa": SmoaConfig}
    return classes[method.partition("-")[0]](**{**SIZES[method], "target_modules": TARGETS[kind], **changes})


def train_a_little(model: torch.nn.Module, seed: int = 0, adapter: str | None = None) -> None:
    """Move the adapter's trained tensors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mine = any(isinstance(p, str) and p in name for p in ("inilora_", "frod_portable_", "smoa_"))
            if mine and (adapter is None or f".{adapter}" in name):
                step = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * step.to(parameter))


def run(model, kind: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return output(model, model_inputs(kind))


@pytest.fixture(params=[(m, k) for m in METHODS for k in KINDS], ids="-".join)
def adapted(request, model_folder):
    """(method, kind, base folder, a trained model)."""
    method, kind = request.param
    folder = model_folder(kind)
    model = get_peft_model(load_base(folder), config_for(method, kind)).eval()
    train_a_little(model)
    return method, kind, folder, model


def test_fresh_get_peft_model_starts_at_the_base_and_equals_the_offline_start(model_folder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    for method in METHODS:
        model = get_peft_model(load_base(folder), config_for(method)).eval()
        assert relative_difference(run(model), run(load_base(folder))) <= 1e-6
        words = {"r": "rank", "lora_alpha": "alpha"}
        options = {words.get(name, name): value for name, value in SIZES[method].items()}
        offline, _ = surgery.init(folder, method.partition("-")[0], target=TARGETS["llama"], **options)
        model.save_pretrained(tmp_path / method)
        online = surgery.Adapter.open(tmp_path / method)
        assert online.tensors.keys() == offline.tensors.keys()
        for name, tensor in offline.tensors.items():
            assert torch.allclose(tensor.float(), online.tensors[name].float(), rtol=1e-4, atol=1e-5), name
        for key in ("base_fingerprint", "format_version", "peft_type", "init_weights", "seed"):
            if key != "base_fingerprint" or method != "inilora":
                assert online.config[key] == offline.config[key], key


def test_disable_gives_the_base(adapted) -> None:
    _, kind, folder, model = adapted
    base, changed = run(load_base(folder), kind), run(model, kind)
    assert relative_difference(changed, base) > 1e-2
    with model.disable_adapter():
        assert torch.equal(run(model, kind), base)
    assert torch.equal(run(model, kind), changed)


def test_merge_and_unmerge(adapted) -> None:
    _, kind, folder, model = adapted
    changed = run(model, kind)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter(safe_merge=True)
    assert relative_difference(run(model, kind), changed) < 1e-5
    model.merge_adapter()  # again: nothing happens
    assert relative_difference(run(model, kind), changed) < 1e-5
    model.unmerge_adapter()
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight)  # to the last bit
    assert torch.equal(run(model, kind), changed)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    assert relative_difference(run(merged, kind), changed) < 1e-5
    assert type(merged) is type(load_base(folder))


def test_merge_refuses_nan(adapted) -> None:
    *_, model = adapted
    layer = next(m for m in model.modules() if isinstance(m, AdapterLayer))
    with torch.no_grad():
        next(iter(getattr(layer, layer.adapter_layer_names[0]).values())).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)


def test_two_adapters_add_up_and_can_be_deleted(adapted, tmp_path: Path) -> None:
    method, kind, folder, model = adapted
    first = run(model, kind)
    model.add_adapter("second", config_for(method, kind, target_modules=TARGETS[kind][:1]))
    assert torch.equal(run(model, kind), first)  # the new one is not active
    model.set_adapter("second")
    assert relative_difference(run(model, kind), run(load_base(folder), kind)) <= 1e-6
    train_a_little(model, seed=1, adapter="second")
    second = run(model, kind)
    assert relative_difference(second, first) > 1e-3
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".second" in n for n in trained)

    model.base_model.set_adapter(["default", "second"])
    both = run(model, kind)
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, AdapterLayer))
    x = torch.randn(3, layer.in_features)
    total = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    expected = x @ (total.T if not layer.fan_in_fan_out else total)
    with torch.no_grad():
        assert torch.allclose(layer(x) - layer.linear(x), expected, atol=1e-4), name
    model.merge_adapter()
    assert relative_difference(run(model, kind), both) < 1e-5
    model.unmerge_adapter()

    model.set_adapter("default")
    model.save_pretrained(tmp_path / "both", selected_adapters=["second"])
    model.delete_adapter("second")
    assert torch.equal(run(model, kind), first)
    assert not any(".second" in n for n in model.state_dict())
    again = PeftModel.from_pretrained(load_base(folder), tmp_path / "both" / "second").eval()
    assert relative_difference(run(again, kind), second) < 1e-6


def test_deleting_the_first_adapter_keeps_the_second(adapted) -> None:
    method, kind, _, model = adapted
    model.add_adapter("second", config_for(method, kind))
    model.set_adapter("second")
    train_a_little(model, seed=1, adapter="second")
    second = run(model, kind)
    model.delete_adapter("default")
    assert torch.equal(run(model, kind), second)


def test_status_and_repr(adapted) -> None:
    *_, model = adapted
    status = model.get_model_status()
    assert status.available_adapters == ["default"] and status.enabled is True
    assert status.peft_types["default"] in ("INILORA", "FROD_PORTABLE", "SMOA")
    assert len(model.get_layer_status()) == sum(isinstance(m, AdapterLayer) for m in model.modules())
    assert "surgery." in repr(model)


def test_deepcopy_is_independent(adapted) -> None:
    _, kind, _, model = adapted
    before = run(model, kind)
    twin = copy.deepcopy(model)
    train_a_little(twin, seed=5)
    assert relative_difference(run(twin, kind), before) > 1e-3
    assert torch.equal(run(model, kind), before)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_base(method: str, model_folder, tmp_path: Path) -> None:
    """The start is the base to the last bit in bfloat16 too; tensors stay float32 unless asked otherwise."""
    folder = model_folder("llama")
    model = get_peft_model(load_base(folder, torch.bfloat16), config_for(method)).eval()
    base = run(load_base(folder, torch.bfloat16))
    assert torch.equal(run(model), base)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    train_a_little(model)
    changed = run(model)
    assert changed.dtype == torch.bfloat16 and relative_difference(changed, base) > 1e-2
    model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(load_base(folder, torch.bfloat16), tmp_path / "out").eval()
    assert torch.equal(run(again), changed)
    # The same adapter on the base widened again: bfloat16 values in float32.
    wide = load_base(folder, torch.bfloat16).float()
    assert relative_difference(run(PeftModel.from_pretrained(wide, tmp_path / "out").eval()), changed) < 0.1

    narrow = get_peft_model(load_base(folder, torch.bfloat16), config_for(method), autocast_adapter_dtype=False).eval()
    assert {p.dtype for p in narrow.parameters() if p.requires_grad} == {torch.bfloat16}
    assert torch.equal(run(narrow), base)
    train_a_little(narrow)
    assert torch.isfinite(run(narrow)).all()


@pytest.mark.parametrize("method", METHODS)
def test_autocast_trains(method: str, model_folder) -> None:
    model = get_peft_model(load_base(model_folder("llama")), config_for(method))
    train_a_little(model)
    inputs = model_inputs("llama")
    grads = []
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output(model, inputs).float().square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.isfinite(grads[1]).all()
    cosine = torch.nn.functional.cosine_similarity(*grads, dim=0)
    assert float(cosine) > 0.98


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(method: str, reentrant: bool, model_folder) -> None:
    grads = []
    for checkpointing in (False, True):
        model = get_peft_model(load_base(model_folder("llama")), config_for(method)).train()
        train_a_little(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        output(model, model_inputs("llama")).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_merged_weight(method: str, model_folder) -> None:
    """An independent reference: the change built densely, differentiated by autograd through F.linear."""
    model = get_peft_model(load_base(model_folder("llama")), config_for(method)).double()
    train_a_little(model)
    layer = next(m for m in model.modules() if isinstance(m, AdapterLayer))
    trained = [getattr(layer, name)["default"] for name in layer.adapter_layer_names]
    x = torch.randn(6, layer.in_features, dtype=torch.float64)
    probe = torch.randn(6, layer.out_features, dtype=torch.float64)
    fused = torch.autograd.grad((layer(x) * probe).sum(), trained)
    dense = layer.linear.weight + layer.delta("default").dense()
    plain = torch.autograd.grad((x @ dense.T * probe).sum(), trained)
    for a, b in zip(fused, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_acts_in_training_only(method: str, model_folder) -> None:
    model = get_peft_model(load_base(model_folder("llama")), config_for(method, dropout=0.5))
    train_a_little(model)
    model.eval()
    assert torch.equal(run(model), run(model))
    model.train()
    torch.manual_seed(0)
    first, second = run(model), run(model)
    assert relative_difference(first, second) > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_modules_to_save(method: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    model = get_peft_model(load_base(folder), config_for(method, modules_to_save=["lm_head"])).eval()
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    with torch.no_grad():
        head.mul_(2.0)
    train_a_little(model)
    expected = run(model)
    model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(load_base(folder), tmp_path / "out").eval()
    assert torch.equal(run(again), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_on_the_meta_device(method: str, low_cpu_mem_usage: bool, model_folder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    model = get_peft_model(load_base(folder), config_for(method)).eval()
    train_a_little(model)
    model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(load_base(folder), tmp_path / "out", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize("method", METHODS)
def test_transformers_load_adapter(method: str, model_folder, tmp_path: Path) -> None:
    """transformers' own road to PEFT, which injects layers and loads tensors without PEFT's load functions."""
    folder = model_folder("llama")
    model = get_peft_model(load_base(folder), config_for(method)).eval()
    train_a_little(model)
    model.save_pretrained(tmp_path / "out")
    base = load_base(folder)
    base.load_adapter(str(tmp_path / "out"))
    assert torch.equal(run(base.eval()), run(model))


@pytest.mark.parametrize("method", METHODS)
def test_layers_to_transform(method: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    config = config_for(method, target_modules=["q_proj"], layers_to_transform=[1, 2])
    model = get_peft_model(load_base(folder), config).eval()
    names = [n for n, m in model.named_modules() if isinstance(m, AdapterLayer)]
    assert [n.split(".layers.")[1] for n in names] == ["1.self_attn.q_proj", "2.self_attn.q_proj"]
    train_a_little(model)
    model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(load_base(folder), tmp_path / "out").eval()
    assert torch.equal(run(again), run(model))


def test_tensors_that_never_arrive_are_named(model_folder, tmp_path: Path) -> None:
    """A saved configuration says that the start is in the file; using it without the file must not compute."""
    from peft import PeftConfig

    folder = model_folder("llama")
    surgery.init(folder, "inilora", tmp_path / "out")
    config = PeftConfig.from_pretrained(tmp_path / "out")
    model = get_peft_model(load_base(folder), config)
    with pytest.raises(surgery.errors.AdapterError, match="never loaded"):
        run(model)
    config.init_weights = True
    fresh = get_peft_model(load_base(folder), config)
    assert relative_difference(run(fresh), run(load_base(folder))) < 1e-6


def test_one_configuration_serves_two_models(model_folder) -> None:
    config = config_for("frod")
    for folder in (model_folder("llama"), model_folder("llama")):
        assert relative_difference(run(get_peft_model(load_base(folder), config)), run(load_base(folder))) < 1e-6


def test_multiplying_heads_are_refused() -> None:
    """nn.MultiheadAttention never calls its output projection: an adapter there would do nothing."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.MultiheadAttention(8, 2)])

    from surgery.models.sites import linear_sites, unsupported_modules

    assert linear_sites(Model()) == []
    assert "layers.0.out_proj" in unsupported_modules(Model())
    with pytest.raises(surgery.errors.TargetError, match="out_proj"):
        get_peft_model(Model(), config_for("inilora", target_modules=["out_proj"]))


def test_convolutions_are_refused_by_name() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv1d(4, 4, 1)

    with pytest.raises(surgery.errors.TargetError, match="conv: Conv1d is not a linear layer"):
        get_peft_model(Model(), config_for("inilora", target_modules=["conv"]))


@pytest.mark.parametrize("method", ["frod", "smoa", "smoa-components"])
def test_plain_load_state_dict_refreshes_what_is_derived(method: str, model_folder) -> None:
    """The road of accelerate, FSDP and a user's own code."""
    folder = model_folder("llama")
    first = get_peft_model(load_base(folder), config_for(method)).eval()
    second = get_peft_model(load_base(folder), config_for(method, seed=5)).eval()
    if method == "frod":  # another basis of the same weights
        with torch.no_grad():
            for name, buffer in second.named_buffers():
                if "frod_portable_V" in name:
                    buffer.mul_(torch.linspace(0.5, 2.0, buffer.shape[1]))
        for layer in (m for m in second.modules() if isinstance(m, AdapterLayer)):
            layer.attachments["default"].invalidate()
    train_a_little(second, seed=3)
    first.load_state_dict(second.state_dict())
    assert relative_difference(run(first), run(second)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_unmerge_in_another_dtype(method: str, model_folder) -> None:
    model = get_peft_model(load_base(model_folder("llama")), config_for(method)).eval()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert torch.isfinite(run(model)).all()
    assert {m.linear.weight.dtype for m in model.modules() if isinstance(m, AdapterLayer)} == {torch.bfloat16}


def test_merge_and_unload_keeps_no_second_copy(model_folder) -> None:
    model = get_peft_model(load_base(model_folder("llama")), config_for("frod")).eval()
    layers = [m for m in model.modules() if isinstance(m, AdapterLayer)]
    model.merge_and_unload()
    assert all(layer._weight_before_merge is None for layer in layers)


def test_copies_for_other_devices_follow_their_source(model_folder) -> None:
    model = get_peft_model(load_base(model_folder("llama")), config_for("frod"))
    layer = next(m for m in model.modules() if isinstance(m, AdapterLayer))
    device = torch.device("cpu")
    for value in (0.0, 1.0):
        assert float(layer.copy_on(device, "default", "P", torch.full((2,), value)).sum()) == 2 * value
    model.add_adapter("second", config_for("frod"))
    model.delete_adapter("default")
    assert not any(key[0] == "default" for key in layer._copies)


def test_types_do_not_mix_in_one_model(model_folder, tmp_path: Path) -> None:
    folder = model_folder("llama")
    for method in ("smoa", "inilora"):
        surgery.init(folder, method, tmp_path / method, target=["q_proj"])
    base = load_base(folder)
    base.load_adapter(str(tmp_path / "smoa"), adapter_name="first")
    with pytest.raises(surgery.errors.AdapterError, match="carries an adapter of type SMOA"):
        base.load_adapter(str(tmp_path / "inilora"), adapter_name="second")


@pytest.mark.parametrize("method", METHODS)
def test_biases_train_and_are_saved(method: str, model_folder, tmp_path: Path) -> None:
    folder = model_folder("bert")
    model = get_peft_model(load_base(folder), config_for(method, target_modules=["query"], bias="adapter_only")).eval()
    biases = [p for n, p in model.named_parameters() if n.endswith("base_layer.bias")]
    assert biases and all(p.requires_grad for p in biases)
    with torch.no_grad():
        for bias in biases:
            bias.add_(0.5)
    model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(load_base(folder), tmp_path / "out").eval()
    assert relative_difference(run(again, "bert"), run(model, "bert")) < 1e-6


def test_a_quantised_base_serves_what_reads_no_weights(model_folder) -> None:
    """bitsandbytes marks its weights with `quant_state`."""
    for variant, refused in (("alpha", False), ("beta", False), ("svd", True)):
        base = load_base(model_folder("llama"))
        base.model.layers[0].self_attn.q_proj.weight.quant_state = object()
        config = IniloraConfig(r=3, variant=variant, target_modules=["q_proj"])
        if refused:
            with pytest.raises(surgery.errors.AdapterError, match="quantised"):
                get_peft_model(base, config)
        else:
            assert relative_difference(run(get_peft_model(base, config)), run(load_base(model_folder("llama")))) < 1e-6


def gradients(model, kind: str) -> dict[str, torch.Tensor]:
    """Of a loss that every output takes part in, with the model as it is."""
    model.zero_grad()
    out = model(**model_inputs(kind)).logits
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def layers(model) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


@pytest.fixture
def together(monkeypatch):
    """The layers that computed base and change together; few tokens are as good as many."""
    used = []
    monkeypatch.setattr(blocks, "MANY_TOKENS", 1)
    for kind in (InputMap, Hadamard, Blocks):
        original = kind.adapted

        def spied(self, x, bias=None, original=original):
            result = original(self, x, bias)
            used.append(result is not None)
            return result

        monkeypatch.setattr(kind, "adapted", spied)
    return used


@pytest.mark.parametrize("method", ["frod", "smoa", "smoa-components"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_in_one_product_is_training_apart(method, kind, model_folder, together, monkeypatch) -> None:
    model = get_peft_model(load_base(model_folder(kind)), config_for(method, kind))
    train_a_little(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    apart = run(model.eval(), kind)
    assert not together
    one = gradients(model.train(), kind)
    assert len(together) == len(layers(model)) and all(together)
    assert relative_difference(run(model, kind), apart) < 1e-5
    monkeypatch.setattr(AdapterLayer, "_trains_as_one", lambda *_: False)
    expected = gradients(model, kind)
    assert one.keys() == expected.keys() and one
    for name, gradient in expected.items():
        assert relative_difference(one[name], gradient) < 1e-4, name


@pytest.mark.parametrize("method", ["frod", "smoa", "smoa-components"])
@pytest.mark.parametrize(
    "why", ["two", "dropout", "trained base", "hook", "backward hook", "replaced", "autocast", "bfloat16"]
)
def test_computed_apart_where_one_product_would_be_another(method, why, model_folder, together) -> None:
    base = load_base(model_folder("llama"))
    model = get_peft_model(base, config_for(method, **({"dropout": 0.5} if why == "dropout" else {}))).train()
    if why == "two":
        model.add_adapter("second", config_for(method))
        model.base_model.set_adapter(["default", "second"])
    for layer in layers(model):
        if why == "trained base":
            layer.base_layer.weight.requires_grad_(True)
        if why == "hook":
            layer.base_layer.register_forward_hook(lambda *_: None)
        if why == "backward hook":
            layer.base_layer.register_full_backward_hook(lambda *_: None)
        if why == "replaced":
            layer.base_layer.forward = layer.base_layer.forward
    if why == "bfloat16":
        model.base_model.model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        run(model)
    assert not together


def test_what_training_holds_follows_its_sources_and_is_given_back(model_folder, together) -> None:
    model = get_peft_model(load_base(model_folder("llama")), config_for("frod")).train()
    run(model)
    first = layers(model)[0]
    assert all(together) and all(layer._held for layer in layers(model))
    before = first._held["default"][1]["WP"]
    run(model)
    assert first._held["default"][1]["WP"] is before
    first.base_layer.weight.data = 2 * first.base_layer.weight.data
    run(model)
    assert torch.allclose(first._held["default"][1]["WP"], 2 * before)
    with torch.no_grad():
        first.base_layer.weight.mul_(2)
    run(model)
    assert torch.allclose(first._held["default"][1]["WP"], 4 * before)
    model.to(torch.float32)
    assert not any(layer._held for layer in layers(model))
    run(model)
    assert all(layer._held for layer in layers(model))
    model.eval()
    assert not any(layer._held for layer in layers(model))


def test_a_basis_too_ill_conditioned_is_not_trained_with(model_folder, together) -> None:
    """`W V^-T V^T` is not W to rounding: the change is computed on the layer's input, as in evaluation."""
    model = get_peft_model(load_base(model_folder("llama")), config_for("frod")).eval()
    for layer in layers(model):
        if "default" in layer.frod_portable_V:
            V = layer.frod_portable_V["default"]
            left, _, right = torch.linalg.svd(V)
            V.copy_(left @ torch.diag(torch.logspace(0, -6, len(V))) @ right)
        layer.attachments["default"].invalidate()
    apart = run(model)
    found = run(model.train())
    assert together and not any(together)
    assert torch.equal(found, apart)
