"""Numbers of every dtype and size: the errors that the tool states equal independently computed ones to 1 %."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import surgery
from surgery.adapters.adapter import Adapter
from surgery.converters.calibration import StoredMoments
from surgery.models.base_model import BaseModel
from surgery.passes.moments import Moments
from tests.helpers.models import edit_tensors, llama_config, save_model, spread
from tests.properties.examples import Layer, changes_of, generator, lora, lora_of, name_of, relative_error

SCALES = [1e-8, 1e-4, 1.0, 1e4, 1e8]
# Wide, high, a single row, a single column, one number; and a layer of which nothing is left.
LAYERS = [
    Layer(20, 9, 4),
    Layer(7, 24, 4),
    Layer(1, 17, 2),
    Layer(15, 1, 2),
    Layer(1, 1, 1),
    Layer(12, 12, 3, 0.5, 0.0),
]
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 1}),
    ("giva", {"rank": 2}),
    ("giva", {"bits": 16, "rank": 1}),
    ("giva", {"max_error": 0.2}),
    ("vera", {"energy": 0.8, "accept_loss": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("to", "options"), FORMS)
def test_conversions_of_narrow_numbers(dtype: torch.dtype, to: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The change of a half-precision file is that of its numbers as they are; the result keeps the dtype."""
    source = lora(LAYERS, 3, dtype=dtype)
    _, report = surgery.convert(source, to, tmp_path / "made", **options)
    made = Adapter.open(tmp_path / "made")
    wanted, found = changes_of(source, LAYERS), changes_of(made, LAYERS)
    assert report.weight_error == pytest.approx(relative_error(wanted, found), rel=1e-2, abs=1e-6)
    for i, site in enumerate(sorted(report.sites, key=lambda site: site.module)):
        assert site.module == name_of(i)
        assert site.weight_error == pytest.approx(relative_error([wanted[i]], [found[i]]), rel=1e-2, abs=1e-6)
    assert 0 < report.weight_error < 0.7
    if to != "giva":
        assert {tensor.dtype for tensor in made.tensors.values()} == {dtype}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("to", "options"), FORMS)
def test_conversions_of_tiny_and_huge_changes(scale: float, to: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Errors are relative: a change times a number is converted with the same error, and the number kept."""
    errors = []
    for factor in (1.0, scale):
        plain = lora(LAYERS, 5)
        tensors = {name: t * factor if "lora_B" in name else t for name, t in plain.tensors.items()}
        source = Adapter(plain.config, tensors)
        folder = tmp_path / f"{factor}"
        _, report = surgery.convert(source, to, folder, **options, force=True)
        wanted, found = changes_of(source, LAYERS), changes_of(Adapter.open(folder), LAYERS)
        assert report.weight_error == pytest.approx(relative_error(wanted, found), rel=1e-2, abs=1e-6)
        errors.append(report.weight_error)
    # Steps of codes are powers of a fraction of two, so that rounding differs a little from scale to scale.
    assert errors[1] == pytest.approx(errors[0], rel=0.05 if to == "giva" else 1e-3)


@pytest.mark.parametrize("to", ["lora", "giva", "vera"])
def test_layers_of_very_different_size_beside_each_other(to: str, tmp_path: Path) -> None:
    """The small one is no part of the whole error, and its own is still told."""
    draws = generator(0)
    pairs = [
        (torch.randn(9, 3, generator=draws) * scale, torch.randn(3, 8, generator=draws)) for scale in (1e-8, 1.0, 1e6)
    ]
    source, layers = lora_of(pairs), [Layer(9, 8, 3)] * 3
    _, report = surgery.convert(source, to, tmp_path / "made", **({"bits": 32} if to == "giva" else {}), energy=0.8)
    wanted, found = changes_of(source, layers), changes_of(Adapter.open(tmp_path / "made"), layers)
    for site in report.sites:
        i = int(site.module.split(".")[1])
        assert site.weight_error == pytest.approx(relative_error([wanted[i]], [found[i]]), rel=1e-2, abs=1e-6)
        assert site.weight_error**2 <= 0.2 + 1e-6


@pytest.mark.parametrize("samples", [1, 3, 500])
@pytest.mark.parametrize("decay", [1.0, 0.3])
@pytest.mark.parametrize(("to", "options"), [("lora", {"rank": 2}), ("giva", {"ratio": 12}), ("vera", {"rank": 8})])
def test_output_errors_under_ill_conditioned_moments(
    samples: int, decay: float, to: str, options: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    """Moments of few samples are singular, of falling inputs nearly so: the stated output error is that of dense
    matrices in float64.
    """
    base = BaseModel.open(llama)
    sites = base.select(["q_proj", "down_proj"])
    draws, inputs, moments, tensors = generator(samples), {}, {}, {}
    for site in sites:
        falling = decay ** torch.arange(site.in_features)
        X = (torch.randn(samples, site.in_features, generator=draws) * falling).double()
        G = torch.randn(samples, site.out_features, generator=draws).double()
        inputs[site.module] = X
        moments[site] = Moments((X.T @ X / samples).float(), (G.T @ G / samples).float(), samples)
        name = f"base_model.model.{site.module}.lora_"
        tensors[f"{name}A.weight"] = torch.randn(4, site.in_features, generator=draws)
        tensors[f"{name}B.weight"] = torch.randn(site.out_features, 4, generator=draws)
    StoredMoments.add(tmp_path / "stats.safetensors", moments)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    source = Adapter(config, tensors)
    settings = {"base": llama, "stats": tmp_path / "stats.safetensors", "accept_loss": True}
    made, report = surgery.convert(source, to, **options, **settings)
    lost = whole = 0.0
    for site in sites:
        W = base.weight(site, torch.device("cpu"))
        X = inputs[site.module]
        old = source.delta(site.module).dense().double() @ X.T
        layers = made.delta(site.module, W).dense().double() if site.module in made.modules else None
        new = layers @ X.T if layers is not None else torch.zeros_like(old)
        expected = float((old - new).norm() / old.norm())
        stated = next(each.output_error for each in report.sites if each.module == site.module)
        # Moments are kept in float32: below that, errors are rounding.
        assert stated == pytest.approx(expected, rel=1e-2, abs=2e-4)
        lost, whole = lost + float((old - new).square().sum()), whole + float(old.square().sum())
    assert report.output_error == pytest.approx((lost / whole) ** 0.5, rel=1e-2, abs=2e-4)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_scale_of_the_moments_does_not_matter(scale: float, llama: Path, tmp_path: Path) -> None:
    base = BaseModel.open(llama)
    sites = base.select(["q_proj"])
    draws = generator(1)
    tensors = {}
    roots = {}
    for site in sites:
        name = f"base_model.model.{site.module}.lora_"
        tensors[f"{name}A.weight"] = torch.randn(4, site.in_features, generator=draws)
        tensors[f"{name}B.weight"] = torch.randn(site.out_features, 4, generator=draws)
        roots[site] = torch.randn(40, site.in_features, generator=draws), torch.randn(40, 32, generator=draws)
    source = Adapter({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}, tensors)
    errors = []
    for factor in (1.0, scale):
        path = tmp_path / f"{factor}.safetensors"
        StoredMoments.add(path, {site: Moments(X.T @ X * factor, G.T @ G) for site, (X, G) in roots.items()})
        for to, options in (("lora", {"rank": 2}), ("giva", {"ratio": 8})):
            errors.append(surgery.convert(source, to, base=llama, stats=path, **options)[1].output_error)
    assert errors[2] == pytest.approx(errors[0], rel=1e-3) and errors[3] == pytest.approx(errors[1], rel=0.05)


def scaled_base(folder: Path, scale: float, dtype: torch.dtype) -> Path:
    """A tiny Llama with layers one number wide, its weights times a number, one of them zero and one of two ranks."""
    config = llama_config(intermediate_size=1, num_hidden_layers=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    spread(model)
    model.to(dtype).save_pretrained(folder)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in list(tensors.items()):
            if "_proj" in name:
                tensors[name] = (value.float() * scale).to(dtype)
        tensors["model.layers.0.self_attn.q_proj.weight"].zero_()
        thin = tensors["model.layers.1.self_attn.q_proj.weight"]
        thin[2:] = thin[:2].repeat(15, 1)

    edit_tensors(folder, edit)
    return folder


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1.0, torch.float32), (1e-8, torch.float32), (1e8, torch.float32), (1.0, torch.bfloat16), (1e8, torch.bfloat16),
     (1.0, torch.float16)],
)  # fmt: skip
def test_what_a_start_holds_of_the_weight(scale: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """IniLoRA's share against exact decompositions, on zero, rank-deficient, 1 x n and n x 1 layers."""
    folder = scaled_base(tmp_path / "base", scale, dtype)
    adapter, report = surgery.init(
        folder, "inilora", tmp_path / "start", rank=4, target=["q_proj", "up_proj", "down_proj"]
    )
    base = BaseModel.open(folder)
    for site in base.select(["q_proj", "up_proj", "down_proj"]):
        W = base.weight(site, torch.device("cpu")).double()
        own = adapter.modules[site.module]
        held = own["inilora_B0"].double() @ own["inilora_A0"].double() * (adapter.config["lora_alpha"] / 4)
        entry = next(each for each in report.sites if each.module == site.module)
        if not W.any():
            assert not held.any() and entry.captured in {None, 0.0, 1.0}
            continue
        exact = 1 - float((W - held).square().sum() / W.square().sum())
        best = torch.linalg.svdvals(W).square()
        assert entry.captured == pytest.approx(exact, rel=1e-2)
        assert exact >= float(best[:4].sum() / best.sum()) - 2e-3
    assert all(bool(tensor.isfinite().all()) for tensor in adapter.tensors.values())


@pytest.mark.parametrize("method", ["frod", "smoa", "smoa-components", "inilora"])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_starts_on_tiny_and_huge_weights_change_nothing(method: str, scale: float, tmp_path: Path) -> None:
    """Zero, rank-deficient and thin layers among them: a start is a change of zero, whatever the weights."""
    folder = scaled_base(tmp_path / "base", scale, torch.float32)
    sizes: dict[str, dict[str, Any]] = {
        "frod": {},
        "smoa": {"rank": 2, "groups": 1},
        "smoa-components": {"rank": 2, "groups": 1, "variant": "components"},
        "inilora": {"rank": 2},
    }
    options, method = sizes[method], method.partition("-")[0]
    adapter, _ = surgery.init(folder, method, target=["q_proj", "down_proj"], **options)
    base = BaseModel.open(folder)
    for site in base.select(["q_proj", "down_proj"]):
        W = base.weight(site, torch.device("cpu"))
        dense = adapter.delta(site.module, W).dense().double()
        assert float(dense.norm()) <= 2e-6 * float(W.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """The merged weight of a half-precision base is `W + dW` in float64, rounded: not a change that was rounded
    before.
    """
    folder = save_model("llama", tmp_path / "float32")
    halves = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    halves.save_pretrained(tmp_path / "base")
    model = get_peft_model(halves, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    surgery.merge(tmp_path / "lora", tmp_path / "base", tmp_path / "merged")
    source = Adapter.open(tmp_path / "lora")
    base, merged = (BaseModel.open(tmp_path / name) for name in ("base", "merged"))
    spacing = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for site in base.select(["q_proj"]):
        W = base.weight(site, torch.device("cpu")).double()
        exact = W + source.delta(site.module).dense().double()
        found = merged.weight(site, torch.device("cpu")).double()
        assert bool(((found - exact).abs() <= spacing * exact.abs() * 1.001 + 1e-7).all())
        assert not torch.equal(found, W)
