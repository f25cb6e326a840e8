"""GiVA's start against the full gradient and its exact decomposition in float64; its layer against a stock LoRA."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import surgery
from surgery.errors import AdapterError, MethodError
from surgery.methods import giva
from surgery.methods.giva import GivaConfig, heights_of
from surgery.methods.registry import method_named
from surgery.models.sites import Site, select_sites
from surgery.peft_types.layer import AdapterLayer
from tests.helpers.models import (
    build,
    labelled_inputs,
    load_base,
    minilm_folder,
    model_inputs,
    output,
    perturb,
    relative_difference,
)
from tests.helpers.reference import Spectrum, angle, own_loss, spectrum, true_gradients
from tests.helpers.texts import docstring_rows, write_rows

# (model, how its fused layers are split)
MODELS: dict[str, tuple[str, dict[str, int] | None]] = {
    "llama": ("llama", None),
    "gpt2": ("gpt2", None),
    "gpt2-whole": ("gpt2", {"c_attn": 1}),
    "t5": ("t5", None),
    "vit": ("vit", None),
}
VARIANTS = ("vr", "vru2r", "vrur", "vrurand")
THIRDS = [32, 32, 32]
RANK = 4


def start(name: str, samples: int = 4, **options: Any) -> tuple[Any, dict[str, dict[str, torch.Tensor]]]:
    """A tiny model and the tensors that GiVA starts with on one batch."""
    kind, split = MODELS[name]
    model = build(kind)
    chosen = {**options, **({"split": split} if split else {})}
    adapter, _ = surgery.init(model, "giva", data=[labelled_inputs(kind, samples)], **chosen)
    return model, {module: tensors for module, tensors in adapter.modules.items() if "giva_A" in tensors}


@functools.cache
def exact(name: str) -> dict[str, list[Spectrum]]:
    """For each layer the decompositions of its parts' true gradients."""
    kind, split = MODELS[name]
    model = build(kind)
    found = true_gradients(model, [labelled_inputs(kind)], own_loss, select_sites(model))
    fused = "attn.c_attn" if kind == "gpt2" and split is None else None
    return {
        module: [spectrum(part) for part in (G.split(THIRDS) if fused and module.endswith(fused) else [G])]
        for module, G in found.items()
    }


def parts(tensors: dict[str, torch.Tensor], spectra: list[Spectrum]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """B and A of each part of a layer."""
    heights = [spectrum.G.shape[0] for spectrum in spectra]
    count = len(spectra)
    return list(zip(tensors["giva_B"].split(heights), tensors["giva_A"].chunk(count), strict=True))


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("name", MODELS)
def test_A_captures_what_the_exact_vectors_do(name: str, rank: int) -> None:
    _, found = start(name, rank=rank)
    expected = exact(name)
    assert found.keys() == expected.keys()
    gaps = 0
    for module, tensors in found.items():
        for (_, A), true in zip(parts(tensors, expected[module]), expected[module], strict=True):
            assert A.shape[0] == min(rank, *true.G.shape)
            assert torch.allclose(A @ A.T, torch.eye(len(A)), atol=1e-5)
            assert true.captured_by(A) >= 0.995, module
            if true.has_gap(len(A), 1.2):
                gaps += 1
                assert angle(A, true.Vh[: len(A)]) <= 1e-3, module
    assert gaps >= 1 or rank == 32


@pytest.mark.parametrize("name", MODELS)
def test_control_random_bases_and_another_loss_capture_less(name: str) -> None:
    expected = exact(name)
    kind, split = MODELS[name]
    other, _ = surgery.init(
        build(kind), "giva", data=[labelled_inputs(kind, seed=9)], **({"split": split} if split else {})
    )
    generator = torch.Generator().manual_seed(0)
    for module, tensors in other.modules.items():
        if "giva_A" not in tensors:  # a head
            continue
        for (_, A), true in zip(parts(tensors, expected[module]), expected[module], strict=True):
            assert true.captured_by(torch.randn(A.shape, generator=generator)) < 0.8, module
            assert true.captured_by(A) < 0.99, module


@pytest.mark.parametrize("rank", [3, 32])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_B_is_what_the_variant_says(variant: str, name: str, rank: int) -> None:
    _, found = start(name, rank=rank, variant=variant)
    _, again = start(name, rank=rank, variant=variant, seed=1)
    expected = exact(name)
    for module, tensors in found.items():
        for (padded, A), true in zip(parts(tensors, expected[module]), expected[module], strict=True):
            count = A.shape[0]
            assert count == min(rank, min(true.G.shape) // (2 if variant == "vru2r" else 1))
            assert not padded[:, count:].any()
            B = padded[:, :count].double()
            if variant == "vrurand":
                assert abs(float(B.std()) - 1) < 4 / B.numel() ** 0.5 > abs(float(B.mean())), module
                continue
            assert torch.allclose(B.T @ B, torch.eye(count, dtype=torch.float64), atol=1e-5), module
            if variant == "vrur" and true.has_gap(count, 1.05):
                # Pair by pair, with one sign: B^T G A^T is the diagonal of singular values.
                core = B.T @ true.G @ A.T.double()
                assert torch.allclose(core, torch.diag(true.S[:count]), atol=2e-3 * float(true.S[0])), module
            if variant == "vru2r" and float(true.S[2 * count - 1]) > 1e-3 * float(true.S[0]):
                held = float((B.T @ true.G).square().sum() / true.S[count : 2 * count].square().sum())
                assert held == pytest.approx(1, abs=5e-3), module
                assert float((B.T @ true.U[:, :count]).abs().max()) < 0.1 or not true.has_gap(count, 1.2), module
        if rank == 3:  # no more than any of these gradients has
            drawn = variant in {"vr", "vrurand"}
            assert torch.allclose(tensors["giva_B"], again[module]["giva_B"], atol=1e-2) != drawn, module
            assert torch.allclose(tensors["giva_A"], again[module]["giva_A"], atol=1e-2), module


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_start_changes_nothing(variant: str, name: str, tmp_path: Path) -> None:
    kind, split = MODELS[name]
    model = build(kind)
    options = {"split": split} if split else {}
    surgery.init(model, "giva", tmp_path / "out", data=[labelled_inputs(kind)], variant=variant, **options)
    inputs = model_inputs(kind)
    with torch.no_grad():
        expected = output(model, inputs)
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").eval()
        assert torch.equal(output(adapted, inputs), expected)


# Real weights and real text, through a data file


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Docstrings of eight packages."""
    rows = docstring_rows(4)
    assert len(rows) == 32
    return write_rows(tmp_path_factory.mktemp("task") / "docstrings.jsonl", rows)


def classifier(adapter: surgery.Adapter) -> Any:
    """MiniLM with the head that an adapter brings."""
    head = adapter.modules["classifier"]
    model = transformers.BertForSequenceClassification.from_pretrained(minilm_folder(), num_labels=len(head["bias"]))
    model.classifier.load_state_dict(head)
    return model


def tokenised() -> dict[str, torch.Tensor]:
    """All of the task in one batch, made without surgery."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    rows = docstring_rows(4)
    texts = [row["text"] for row in rows]
    found = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    return {**found, "labels": torch.tensor([row["label"] for row in rows])}


@functools.cache
def minilm_start(task: Path, rank: int, batch_size: int) -> tuple[surgery.Adapter, Any]:
    options = {"task": "seq-cls", "max_length": 48, "rank": rank, "batch_size": batch_size}
    return surgery.init(minilm_folder(), "giva", data=task, **options)


@pytest.fixture(scope="module")
def minilm_spectra(task: Path) -> dict[str, Spectrum]:
    model = classifier(minilm_start(task, 8, 32)[0])
    return {m: spectrum(G) for m, G in true_gradients(model, [tokenised()], own_loss, select_sites(model)).items()}


@pytest.mark.parametrize(("rank", "batch_size", "floor"), [(8, 32, 0.995), (32, 32, 0.995), (8, 8, 0.99)])
def test_minilm_on_real_text(rank: int, batch_size: int, floor: float, task: Path, minilm_spectra) -> None:
    """One batch, and the same samples in four of them."""
    adapter, report = minilm_start(task, rank, batch_size)
    assert (report.modules, report.samples, report.labels) == (36, 32, 8)
    with torch.no_grad():
        assert report.loss == pytest.approx(float(own_loss(classifier(adapter), tokenised())), rel=1e-4)
    generator = torch.Generator().manual_seed(0)
    for module, true in minilm_spectra.items():
        A = adapter.modules[module]["giva_A"]
        assert true.captured_by(A) >= floor, module
        assert true.captured_by(torch.randn(A.shape, generator=generator)) < 0.5, module
        if true.has_gap(rank, 1.4) and float(true.S[rank - 1]) > 1e-4 * float(true.S[0]):
            assert angle(A, true.Vh[:rank]) < 0.05, module


# The adapter as such


def lora_of(adapter: surgery.Adapter, model: Any) -> Any:
    """The stock LoRA that a GiVA adapter is: `diag(o) B` and `diag(s) A`, in blocks where a layer is split."""
    config = GivaConfig(**{k: adapter.config[k] for k in ("r", "variant", "split")})
    ranks: dict[str, int] = {}
    factors = {}
    for module, tensors in adapter.modules.items():
        o, s, A, B = (tensors[f"giva_{name}"] for name in ("o", "s", "A", "B"))
        heights = heights_of(config, module, len(o))
        rank = len(s) // len(heights)
        blocks = [block[:, :rank] for block in B.split(heights)]
        factors[module] = o[:, None] * torch.block_diag(*blocks), s[:, None] * A
        ranks[module] = len(s)
    lora = get_peft_model(
        model, LoraConfig(r=1, rank_pattern=ranks, alpha_pattern=ranks, target_modules=adapter.config["target_modules"])
    )
    with torch.no_grad():
        for module, (B, A) in factors.items():
            layer = lora.base_model.model.get_submodule(module)
            layer.lora_B["default"].weight.copy_(B)
            layer.lora_A["default"].weight.copy_(A)
    return lora.eval()


@pytest.mark.parametrize("variant", ["vr", "vru2r"])
@pytest.mark.parametrize("name", MODELS)
def test_is_a_stock_lora_of_rank_r(name: str, variant: str, tmp_path: Path) -> None:
    kind, split = MODELS[name]
    model = build(kind)
    options = {"split": split} if split else {}
    batch = labelled_inputs(kind)
    surgery.init(model, "giva", tmp_path / "start", data=[batch], variant=variant, task="feature-extraction", **options)
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "start", is_trainable=True).eval()
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "trained")
    inputs = model_inputs(kind)
    adapter = surgery.Adapter.open(tmp_path / "trained")
    with torch.no_grad():
        base, ours = output(model, inputs), output(adapted, inputs)
        assert relative_difference(ours, base) > 1e-2
        stock = lora_of(adapter, copy.deepcopy(model))
        assert relative_difference(output(stock, inputs), ours) <= 1e-5
        merged = adapted.merge_and_unload()
        assert relative_difference(output(merged, inputs), ours) <= 1e-4
    # And from the file alone.
    for module in adapter.modules:
        layer = stock.base_model.model.get_submodule(module)
        change = layer.get_delta_weight("default").detach()
        change = change.T if layer.fan_in_fan_out or kind == "gpt2" else change
        assert torch.allclose(adapter.delta(module).dense(), change, atol=1e-5 * float(change.abs().max())), module


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_from_files(kind: str, model_folder, tmp_path: Path) -> None:
    """Split layers and bases that only a seed gives, beside the files."""
    folder = model_folder(kind)
    batch = labelled_inputs(kind)
    surgery.init(folder, "giva", tmp_path / "start", data=[batch], store_bases=False)
    adapted = PeftModel.from_pretrained(load_base(folder), tmp_path / "start", is_trainable=True).eval()
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "trained")
    surgery.merge(tmp_path / "trained", folder, tmp_path / "merged")
    inputs = model_inputs(kind)
    with torch.no_grad():
        merged, expected = output(load_base(tmp_path / "merged"), inputs), output(adapted, inputs)
    assert relative_difference(merged, expected) <= 1e-4


def test_file_without_bases_holds_A_and_a_check_of_B(llama: Path, tmp_path: Path) -> None:
    batch = labelled_inputs("llama")
    stored, wide = surgery.init(llama, "giva", tmp_path / "stored", data=[batch])
    bare, narrow = surgery.init(llama, "giva", tmp_path / "bare", data=[batch], store_bases=False)
    assert narrow.bytes < 0.75 * wide.bytes
    module = "model.layers.1.self_attn.q_proj"
    assert set(stored.modules[module]) == {"giva_o", "giva_s", "giva_A", "giva_B"}
    assert set(bare.modules[module]) == {"giva_o", "giva_s", "giva_A", "giva_check"}
    model = PeftModel.from_pretrained(load_base(llama), tmp_path / "bare")
    B = model.base_model.model.get_submodule(module).giva_B["default"]
    assert torch.equal(B, stored.modules[module]["giva_B"])


# In PEFT as its own types


@pytest.fixture(params=["llama", "gpt2"])
def trained(request, tmp_path: Path) -> tuple[str, Any, Path, Any]:
    """(kind, base, folder of a start, a trained model); GPT-2 with a split layer."""
    base = build(request.param)
    surgery.init(base, "giva", tmp_path / "start", data=[labelled_inputs(request.param)], rank=RANK)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "start", is_trainable=True).eval()
    perturb(model)
    return request.param, base, tmp_path / "start", model


def run(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return output(model, model_inputs(kind))


def test_merging_disabling_and_several_adapters(trained) -> None:
    kind, base, folder, model = trained
    before, expected = run(base, kind), run(model, kind)
    with model.disable_adapter():
        assert torch.equal(run(model, kind), before)
    model.merge_adapter()
    assert relative_difference(run(model, kind), expected) <= 1e-5
    model.unmerge_adapter()
    assert torch.equal(run(model, kind), expected)
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    assert torch.equal(run(model, kind), before)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(run(model, kind), expected)


def test_half_precision_base_starts_exactly(trained) -> None:
    kind, base, folder, _ = trained
    half = copy.deepcopy(base).to(torch.bfloat16)
    for autocast in (True, False):
        model = PeftModel.from_pretrained(
            copy.deepcopy(half), folder, is_trainable=True, autocast_adapter_dtype=autocast
        ).eval()
        assert torch.equal(run(model, kind), run(half, kind))
        dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
        assert dtypes == {torch.float32 if autocast else torch.bfloat16}


def test_gradients_are_those_of_the_dense_change(trained) -> None:
    """`dW = diag(o) B diag(s) A`, block by block where a layer is split, written out and differentiated by autograd."""
    kind, _, _, model = trained
    layers = [module for module in model.double().modules() if isinstance(module, AdapterLayer)]
    assert len(layers) == {"llama": 21, "gpt2": 8}[kind]
    for layer in layers:
        o, s, A, B = (getattr(layer, f"giva_{name}")["default"] for name in ("o", "s", "A", "B"))
        generator = torch.Generator().manual_seed(0)
        x, probe = (torch.randn(6, n, generator=generator).double() for n in (layer.in_features, layer.out_features))
        parts = len(s) // RANK
        change = torch.cat(
            [
                o_part[:, None] * (B_part * s_part) @ A_part
                for o_part, s_part, A_part, B_part in zip(*(t.chunk(parts) for t in (o, s, A, B)), strict=True)
            ]
        )
        weight = layer.linear.weight.T if layer.fan_in_fan_out else layer.linear.weight
        found = torch.autograd.grad((layer(x) * probe).sum(), [o, s])
        expected = torch.autograd.grad((x @ (weight + change).T * probe).sum(), [o, s])
        assert all(torch.allclose(*pair, rtol=1e-6, atol=1e-9) for pair in zip(found, expected, strict=True))


def test_transformers_own_loading(trained, tmp_path: Path) -> None:
    kind, base, _, model = trained
    model.save_pretrained(tmp_path / "trained")
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path / "trained"))
    assert torch.equal(run(loaded.eval(), kind), run(model, kind))


def site(out_features: int = 96, in_features: int = 32, name: str = "h.0.attn.c_attn") -> Site:
    return Site(name, name, "h.*.attn.c_attn", 0, out_features, in_features)


@pytest.mark.parametrize(
    ("split", "heights"),
    [
        (None, [32, 32, 32]),
        ({"c_attn": 1}, [96]),
        ({"c_attn": 2}, [48, 48]),
        ({"attn.c_attn": [64, 16, 16]}, [64, 16, 16]),
        ({"h.0.attn.c_attn": 1, "c_attn": 3}, [96]),
    ],
)
def test_split_of_the_user_goes_before_what_is_known(split, heights: list[int]) -> None:
    method = method_named("giva")
    options = method.complete({"split": split} if split else {}, [site()], transformers.GPT2Config())
    assert heights_of(method.make_config(options, {}), "h.0.attn.c_attn", 96) == heights


@pytest.mark.parametrize(
    ("config", "name", "heights"),
    [
        (transformers.GPT2Config(), "h.0.attn.c_attn", [32, 32, 32]),
        (transformers.GPT2Config(), "h.0.crossattention.c_attn", [48, 48]),
        (
            transformers.Phi3Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=1, pad_token_id=0),
            "h.0.qkv_proj",
            [32, 8, 8],
        ),
        (transformers.Phi3Config(pad_token_id=0), "h.0.gate_up_proj", [48, 48]),
        (transformers.BertConfig(), "h.0.c_attn", [96]),
        (None, "h.0.c_attn", [96]),
    ],
)
def test_known_fused_layers(config, name: str, heights: list[int]) -> None:
    method = method_named("giva")
    fused = site(sum(heights), name=name)
    options = method.complete({}, [fused], config)
    assert heights_of(method.make_config(options, {}), name, sum(heights)) == heights


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"rank": 8}, None),
        ({"rank": 20}, "rank 20 is capped at min(in, out) in 6 of 21 layers (down to 16)"),
        ({"rank": 16, "variant": "vru2r"}, "rank 16 is capped at min(in, out) / 2 in 6 of 21 layers (down to 8)"),
    ],
)
def test_capped_rank_is_noted(options, note: str | None) -> None:
    _, report = surgery.init(build("llama"), "giva", data=[labelled_inputs("llama")], **options)
    assert [line for line in report.notes if line.startswith("rank")] == ([note] if note else [])


@pytest.mark.parametrize("store_bases", [True, False])
def test_start_without_a_gradient_names_the_way_out(store_bases: bool) -> None:
    config = GivaConfig(target_modules=["q_proj"], store_bases=store_bases)
    with pytest.raises(AdapterError, match="surgery init --method giva --data FILE"):
        get_peft_model(build("llama"), config)


def test_bases_from_the_gradient_must_be_stored() -> None:
    with pytest.raises(MethodError, match="store the bases"):
        surgery.init(build("llama"), "giva", data=[labelled_inputs("llama")], variant="vrur", store_bases=False)


def test_rank_of_a_split_layer_is_its_largest_parts() -> None:
    """A part that is lower than the rank is cut to its own height; a packed layer has the one in its configuration."""
    site = Site("qkv", "qkv", "qkv", None, 12, 16)
    config = GivaConfig(r=4, split={"qkv": [8, 2, 2]}, target_modules=["qkv"])
    assert method_named("giva").rank_at(config, site) == 4
    config.packed = {"qkv": [12, 16, 3]}
    assert method_named("giva").rank_at(config, site) == 3


@pytest.mark.parametrize("variant", ["vr", "vrurand"])
def test_random_B_of_parts_of_different_heights(variant: str) -> None:
    """Each part has its own columns, as many as it has rows; the others are zero."""
    site = Site("qkv", "qkv", "qkv", None, 12, 16)
    config = GivaConfig(r=4, variant=variant, split={"qkv": [8, 2, 2]}, target_modules=["qkv"])
    B = giva._random_B(config, site)
    assert B.shape == (12, 4)
    for block, rank in zip(B.split([8, 2, 2]), (4, 2, 2), strict=True):
        assert not block[:, rank:].any() and block[:, :rank].all()
        if variant == "vr":
            torch.testing.assert_close(block[:, :rank].T @ block[:, :rank], torch.eye(rank))


@pytest.mark.parametrize(
    ("variant", "sides", "rank"),
    [("vru2r", (3, 9), 1), ("vru2r", (1, 9), 1), ("vru2r", (9, 6), 3), ("vru2r", (20, 30), 4), ("vr", (3, 9), 3)],
)
def test_rank_leaves_room_for_two_sets_of_left_vectors(variant: str, sides: tuple[int, int], rank: int) -> None:
    assert GivaConfig(r=4, variant=variant, target_modules=["x"]).rank_of(*sides) == rank
