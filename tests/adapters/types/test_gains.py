"""DoRA and IA3 in packed GiVA: gains on the base weight, through every verb, beside stock PEFT and dense maths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.adapters.adapter import Adapter
from surgery.errors import AdapterError, MethodError
from surgery.serving.store import Store
from surgery.storage import format_version
from surgery.system.tensors import Tensors
from tests.helpers.kinds import base_of, inputs_of, trained, verbs
from tests.helpers.models import edit_tensors, load_base, output

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GAINS = "base_model.giva_gains"
# Base, configuration, what the gains are on.
KINDS: dict[str, tuple[str, Any, set[str]]] = {
    "DoRA": ("llama", lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]), {"rows"}),
    "DoRA, biases": ("qwen", lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["v_proj"]), {"rows"}),
    "DoRA, scaled embedding": (
        "gemma", lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"]), {"rows"},
    ),
    "DoRA, convolutions": (
        "resnet",
        lambda: peft.LoraConfig(r=3, use_dora=True, target_modules=r".*layers\.\d\.layer\.[01]\.convolution"),
        {"rows"},
    ),
    "DoRA, Conv1D": ("gpt2", lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["c_attn"]), {"rows"}),
    "IA3": (
        "qwen",
        lambda: peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        {"outputs", "inputs"},
    ),
    "IA3, Conv1D": (
        "gpt2",
        lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        {"outputs", "inputs"},
    ),
}  # fmt: skip


def source(name: str, folder: Path) -> tuple[str, Path, Path]:
    """The kind of the base, its folder, and an adapter's."""
    kind, config, _ = KINDS[name]
    base = base_of(kind, folder / "base")
    trained(base, folder / "made", config())
    return kind, base, folder / "made"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_as_stock_peft_has_it(name: str, tmp_path: Path) -> None:
    kind, base, made = source(name, tmp_path)
    found = dict(verbs(kind, base, made, tmp_path, ("giva",)))
    assert max(found.values()) < 1e-5, found
    opened = Adapter.open(tmp_path / "giva")
    assert set(opened.config["gains"].values()) == KINDS[name][2] and opened.config["format_version"] == 4
    assert surgery.compare(made, tmp_path / "giva", base=base).weight_error < 1e-6
    if kind == "gemma":  # its head is tied to the embedding, which PEFT's own merge does not take apart
        return
    # PEFT's own merge and its undoing.
    model = surgery.load(tmp_path / "giva", load_base(base)).eval()
    inputs = inputs_of(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        want = output(model, inputs)
        model.merge_adapter()
        assert torch.allclose(output(model, inputs), want, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        plain = model.merge_and_unload()
        assert torch.allclose(output(plain, inputs), want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DoRA", "IA3"])
@pytest.mark.parametrize("budget", [{"max_error": 0.01}, {"energy": 0.98}, {"ratio": 3.0}, {"bits": 16}])
def test_codes_keep_what_the_budget_says(name: str, budget: dict[str, Any], tmp_path: Path) -> None:
    kind, base, made = source(name, tmp_path)
    given: dict[str, Any] = {"energy": 0.9999, **budget} if "bits" in budget else budget
    _, report = surgery.convert(made, "giva", tmp_path / "giva", base=base, accept_loss=True, **given)
    assert report.bytes == (tmp_path / "giva" / FILE).stat().st_size and 0 < report.gain_bytes < report.bytes
    assert {site.gains for site in report.sites} == KINDS[name][2]
    if "max_error" in budget:
        assert report.weight_error <= 0.01
    if "energy" in budget:
        assert all(site.weight_error**2 <= 0.02 for site in report.sites)
    if "ratio" in budget:
        assert report.bytes <= report.source_bytes / 3
    # The logits move by as much as the change does, about.
    with torch.no_grad():
        inputs = inputs_of(kind)
        bare = output(load_base(base), inputs)
        want = output(peft.PeftModel.from_pretrained(load_base(base), made).eval(), inputs)
        off = output(surgery.load(tmp_path / "giva", load_base(base)).eval(), inputs) - want
        assert float(off.norm() / (want - bare).norm()) < 3 * max(report.weight_error, 1e-6)
    # Opened and saved again, by us and by PEFT, it is the same file.
    whole = (tmp_path / "giva" / FILE).read_bytes()
    Adapter.open(tmp_path / "giva").save(tmp_path / "again")
    surgery.load(tmp_path / "giva", load_base(base)).save_pretrained(tmp_path / "by-peft")
    assert (tmp_path / "again" / FILE).read_bytes() == whole == (tmp_path / "by-peft" / FILE).read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_a_step_moves_the_gains_and_they_are_saved(tmp_path: Path) -> None:
    kind, base, made = source("DoRA", tmp_path)
    surgery.convert(made, "giva", tmp_path / "giva", base=base, max_error=0.01)
    model = surgery.load(tmp_path / "giva", load_base(base), is_trainable=True)
    gains = {name: value for name, value in model.named_parameters() if ".giva_g." in name}
    before = {name: value.detach().clone() for name, value in gains.items()}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    ids = torch.arange(3, 15).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    # The gradient of a gain by the dense weight change's: dL/dg_i = <dL/dW_i, W_i>.
    assert len(gains) == 6 and all(bool(value.grad.any()) for value in gains.values() if value.grad is not None)
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in gains.items())
    want = output(model.eval(), inputs_of(kind)).detach()
    model.save_pretrained(tmp_path / "trained")
    assert load_file(tmp_path / "trained" / FILE)[GAINS].dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(output(surgery.load(tmp_path / "trained", load_base(base)).eval(), inputs_of(kind)), want)


@pytest.mark.filterwarnings("ignore")
def test_gradients_are_those_of_the_dense_change(tmp_path: Path) -> None:
    _, base, made = source("IA3", tmp_path)
    surgery.convert(made, "giva", tmp_path / "giva", base=base, energy=1.0)
    model = surgery.load(tmp_path / "giva", load_base(base), is_trainable=True)
    layers = {name: m for name, m in model.base_model.model.named_modules() if type(m).__name__ == "AdapterLayer"}
    dense = load_base(base)
    for name, layer in layers.items():
        weight = dense.get_submodule(name)
        g = layer.giva_g["default"].detach()
        rows = layer.attachments["default"].config.gains[name] == "outputs"
        weight.weight.data *= (1 + g)[:, None] if rows else 1 + g
        if rows:
            weight.bias.data *= 1 + g
    ids = torch.arange(3, 15).reshape(2, 6)
    for each in (model, dense):
        each(input_ids=ids, labels=ids).loss.backward()
    for name, layer in layers.items():
        own, linear = layer.giva_g["default"], dense.get_submodule(name)
        if layer.attachments["default"].config.gains[name] == "outputs":
            want = (linear.weight.grad * linear.weight).sum(1) + linear.bias.grad * linear.bias
        else:
            want = (linear.weight.grad * linear.weight).sum(0)
        assert torch.allclose(own.grad, want / (1 + own), rtol=1e-3, atol=1e-6)


def _file(folder: Path) -> Tensors:
    return load_file(folder / FILE)


@pytest.mark.filterwarnings("ignore")
def test_broken_gains_are_refused_by_name(tmp_path: Path) -> None:
    _, base, made = source("DoRA", tmp_path)
    surgery.convert(made, "giva", tmp_path / "giva", base=base, max_error=0.01)
    tensors, config = _file(tmp_path / "giva"), json.loads((tmp_path / "giva" / CONFIG).read_text())
    module = next(iter(config["gains"]))
    flipped = tensors[GAINS].clone()
    flipped[len(flipped) // 2] ^= 1
    wrong: list[tuple[Tensors, dict[str, Any], str]] = [
        ({**tensors, GAINS: flipped}, {}, "giva_gains: the coded factors are damaged"),
        ({**tensors, GAINS: tensors[GAINS][:-4].clone()}, {}, "giva_gains: the coded factors are damaged or cut short"),
        ({**tensors, GAINS: torch.zeros(3)}, {}, "giva_gains: does not hold the gains of the layers"),
        ({**tensors, GAINS: torch.zeros(3, dtype=torch.int32)}, {}, "giva_gains: does not hold the gains"),
        ({n: t for n, t in tensors.items() if n != GAINS}, {}, "the file lacks base_model.giva_gains"),
        (tensors, {"gains": {**config["gains"], "no.layer": "rows"}}, "gains: no.layer is no packed layer"),
        (tensors, {"gains": {**config["gains"], module: "diagonal"}}, "has 'diagonal', expected rows, outputs, inputs"),
        (tensors, {"gains": [module]}, "gains"),
        (tensors, {"packed": {**config["packed"], module: [*config["packed"][module][:2], 0]}}, "damaged"),
        (tensors, {"gains": None}, "base_model.giva_gains"),
    ]
    for number, (held, settings, message) in enumerate(wrong):
        folder = tmp_path / f"wrong-{number}"
        folder.mkdir()
        save_file(held, folder / FILE, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps({**config, **settings}))
        with pytest.raises(AdapterError, match=message):
            surgery.merge(folder, base, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore")
def test_an_older_reader_names_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base, made = source("IA3", tmp_path)
    surgery.convert(made, "giva", tmp_path / "giva", base=base, energy=1.0)
    monkeypatch.setattr(format_version, "FORMAT_VERSION", 3)
    with pytest.raises(AdapterError, match="format version 4, this surgery reads up to 3: upgrade"):
        Adapter.open(tmp_path / "giva")
    with pytest.raises(AdapterError, match="format version 4"):
        peft.PeftModel.from_pretrained(load_base(base), tmp_path / "giva")


@pytest.mark.filterwarnings("ignore")
def test_what_needs_the_base_says_so_in_one_line(tmp_path: Path) -> None:
    _, base, made = source("DoRA", tmp_path)
    with pytest.raises(AdapterError, match="depends on its base model: give it with --base"):
        surgery.convert(made, "giva", energy=1.0)
    surgery.convert(made, "giva", tmp_path / "store" / "giva", base=base, energy=1.0)
    giva = tmp_path / "store" / "giva"
    for verb in (
        lambda: surgery.convert(giva, "lora", rank=2),
        lambda: surgery.compare(giva, made),
        lambda: surgery.export(giva, "vllm", tmp_path / "out", rank=4),
        lambda: Store(tmp_path / "store", tmp_path / "cache").get("giva"),
    ):
        with pytest.raises(AdapterError, match="depends on its base model: give it with --base"):
            verb()
    with pytest.raises(AdapterError, match="has full rank; say with --rank or --energy"):
        surgery.export(giva, "vllm", tmp_path / "out", base=base)
    report = surgery.export(giva, "vllm", tmp_path / "out", base=base, rank=8)
    assert not report.exact and 0 < report.weight_error < 1
    _, cut = surgery.convert(giva, "lora", tmp_path / "lora", base=base, rank=8, accept_loss=True)
    assert cut.weight_error == pytest.approx(surgery.compare(giva, tmp_path / "lora", base=base).weight_error, rel=1e-3)
    inspected = surgery.inspect(giva)
    assert "6 layers have gains on the base weight: 6 on rows" in inspected.notes
    assert {site.gains for site in inspected.sites} == {"rows"}


@pytest.mark.filterwarnings("ignore")
def test_a_packed_file_is_packed_again(tmp_path: Path) -> None:
    _, base, made = source("IA3", tmp_path)
    surgery.convert(made, "giva", tmp_path / "fine", base=base, max_error=1e-3)
    _, report = surgery.convert(tmp_path / "fine", "giva", tmp_path / "coarse", base=base, max_error=0.1)
    assert report.weight_error <= 0.1 and report.bytes < (tmp_path / "fine" / FILE).stat().st_size
    assert surgery.compare(made, tmp_path / "coarse", base=base).weight_error < 0.11


@pytest.mark.filterwarnings("ignore")
def test_a_layer_whose_gains_are_not_worth_their_bits_has_none(tmp_path: Path) -> None:
    _, base, made = source("DoRA", tmp_path)

    def as_the_base(tensors: Tensors) -> None:
        """Magnitudes at which one layer's gains are one."""
        model = load_base(base)
        name = next(name for name in tensors if name.endswith("lora_magnitude_vector"))
        stem = name.removesuffix("lora_magnitude_vector")
        module = stem.removeprefix("base_model.model.").rstrip(".")
        changed = (
            model.get_submodule(module).weight + 2 * tensors[f"{stem}lora_B.weight"] @ tensors[f"{stem}lora_A.weight"]
        )
        tensors[name] = changed.detach().norm(dim=1)

    edit_tensors(made, as_the_base, FILE)
    giva, report = surgery.convert(made, "giva", tmp_path / "giva", base=base, max_error=0.05)
    assert sum(site.gains is None for site in report.sites) == 1 and len(giva.config["gains"]) == 5
    assert surgery.compare(made, tmp_path / "giva", base=base).weight_error <= 0.051
    with pytest.raises(MethodError, match="too small"):
        surgery.convert(made, "giva", base=base, size=20, accept_loss=True)
