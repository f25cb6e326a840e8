"""What `surgery.inspect` says equals what the files and dense decompositions say."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import surgery
from surgery.deltas.operators import LowRank, Sum
from surgery.deltas.products import HadamardProduct, Kronecker, as_low_rank
from surgery.deltas.spectrum import effective_rank, has_cheap_spectrum, singular_values
from surgery.display.heat_maps import short_number, short_roles
from surgery.errors import AdapterError, CheckpointError, MethodError, OutputError
from surgery.storage import safetensors_read as tensor_files
from tests.helpers.command_line import contents, invoke
from tests.helpers.models import edit_tensors, llama_config, load_base
from tests.merging.test_merge import trained

FILE = "adapter_model.safetensors"


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> Path:
    config = peft.LoraConfig(r=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return trained(load_base(llama), config, tmp_path / "lora")


def pair(out: int, rank: int, size: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, rank, generator=generator), torch.randn(rank, size, generator=generator), 0.7)


@pytest.mark.parametrize(
    "delta",
    [
        pair(13, 4, 9, 0),
        Sum([(1.5, pair(13, 2, 9, 0)), (-1.0, pair(13, 2, 9, 1))]),
        HadamardProduct(pair(30, 2, 20, 0), pair(30, 3, 20, 1), 2.0),
        Kronecker(pair(4, 2, 5, 0), pair(6, 1, 3, 1), -0.5),
        Kronecker(as_low_rank(torch.randn(3, 4)), as_low_rank(torch.randn(5, 2)), 3.0),
    ],
)
def test_singular_values_are_those_of_the_dense_matrix(delta: Any) -> None:
    assert has_cheap_spectrum(delta)
    expected = torch.linalg.svdvals(delta.dense().double())
    found = singular_values(delta)
    assert len(found) <= len(expected)
    torch.testing.assert_close(found, expected[: len(found)], atol=1e-5, rtol=1e-5)
    assert float(expected[len(found) :].sum()) < 1e-4
    assert not torch.allclose(found * 1.01, expected[: len(found)], rtol=1e-5)


def test_a_change_without_factors_is_decomposed_whole() -> None:
    full = HadamardProduct(pair(6, 3, 5, 0), pair(6, 3, 5, 1))
    assert not has_cheap_spectrum(full)
    torch.testing.assert_close(singular_values(full), torch.linalg.svdvals(full.dense().double()))


@pytest.mark.parametrize("share", [0.5, 0.95, 0.99, 1.0])
def test_effective_rank_is_tight(share: float) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).sort(descending=True).values.double()
    energy = values.square()
    rank = effective_rank(values, share)
    assert float(energy[:rank].sum() / energy.sum()) >= share - 1e-12
    assert float(energy[: rank - 1].sum() / energy.sum()) < share


def test_effective_rank_at_its_edges() -> None:
    assert effective_rank(torch.zeros(4), 0.95) == 0
    assert effective_rank(torch.zeros(0), 0.95) == 0
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0]), 1.0) == 1
    assert effective_rank(torch.ones(7), 1.0) == 7
    assert effective_rank(torch.tensor([3.0, 1.0]), 0.9) == 1  # exactly 9 of 10


def test_an_adapter(lora: Path, llama: Path) -> None:
    found = surgery.inspect(lora)
    tensors = load_file(lora / FILE)
    assert (found.kind, found.peft_type, found.task, found.base) == ("adapter", "LORA", "CAUSAL_LM", str(llama))
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert found.bytes == (lora / FILE).stat().st_size and found.dtypes == {"float32": 4 * found.parameters}
    assert found.modules == len(found.sites) == 6
    total = 0.0
    for site in found.sites:
        A, B = (tensors[f"base_model.model.{site.module}.lora_{letter}.weight"].double() for letter in "AB")
        dense = B @ A * 8 / 6
        values = torch.linalg.svdvals(dense)
        shares = values.square().cumsum(0) / values.square().sum()
        assert site.shape == tuple(dense.shape) and site.rank == 6
        assert site.norm == pytest.approx(float(values.square().sum().sqrt()), rel=1e-5)
        assert site.rank_95 == int((shares < 0.95).sum()) + 1 and site.rank_99 == int((shares < 0.99).sum()) + 1
        total += site.norm**2
    assert all(site.energy == pytest.approx(site.norm**2 / total) for site in found.sites)
    roles = {role.role: role for role in found.roles}
    assert set(roles) == {"model.layers.*.self_attn.q_proj", "model.layers.*.mlp.down_proj"}
    down = roles["model.layers.*.mlp.down_proj"]
    assert down.shapes == [(32, 48)] and down.layers == 3 and down.ranks == [6]
    assert sum(role.energy or 0 for role in found.roles) == pytest.approx(1)


def test_a_layer_of_zeros_has_no_rank(lora: Path) -> None:
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(lora, lambda tensors: tensors[name].zero_(), FILE)
    site = next(s for s in surgery.inspect(lora).sites if s.module == "model.layers.1.self_attn.q_proj")
    assert (site.norm, site.energy, site.rank_95, site.rank_99) == (0.0, 0.0, 0, 0)


def test_a_model_is_told_from_its_headers(model_folder, monkeypatch) -> None:
    def unread(path: Path, name: str) -> torch.Tensor:
        raise AssertionError(f"read {name}")

    monkeypatch.setattr(tensor_files, "read_tensor", unread)
    for kind, linears in (("llama-bf16-sharded", 22), ("gpt2", 9), ("vit", 13), ("t5", 37)):
        folder = model_folder(kind)
        found = surgery.inspect(folder)
        files = [load_file(path) for path in folder.glob("*.safetensors")]
        assert found.kind == "model" and found.files == len(files) and found.peft_type is None
        assert found.parameters == sum(tensor.numel() for file in files for tensor in file.values())
        assert found.modules == linears
        assert all(s.shape and s.parameters == s.shape[0] * s.shape[1] and s.norm is None for s in found.sites)
        size = 2 if "bf16" in kind else 4
        assert all(s.bytes == size * s.parameters for s in found.sites)
    assert set(surgery.inspect(model_folder("llama-bf16-sharded")).dtypes) == {"bfloat16"}
    assert {role.layers for role in surgery.inspect(model_folder("vit")).roles} == {1, 2}


def test_spectra_of_a_model_read_its_weights(llama: Path) -> None:
    found = surgery.inspect(llama, spectra=True)
    weights = load_file(llama / "model.safetensors")
    site = found.sites[0]
    values = torch.linalg.svdvals(weights[f"{site.module}.weight"].double())
    assert site.norm == pytest.approx(float(values.square().sum().sqrt()))
    assert site.rank_95 == effective_rank(values, 0.95) < site.rank_99


def test_a_model_of_seventy_billion_answers_in_seconds(tmp_path: Path) -> None:
    """Sparse files of the right sizes: nothing but headers can be read from them."""
    config = llama_config(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for name, tensor in model.state_dict().items():
        if end > 4e9:
            shards, end = [*shards, {}], 0
        start, end = end, end + tensor.numel() * 2
        shards[-1][name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    for number, entries in enumerate(shards):
        header = json.dumps(entries).encode()
        with (tmp_path / f"{number}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in entries.values()))
    files = {name: f"{number}.safetensors" for number, entries in enumerate(shards) for name in entries}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    started = time.perf_counter()
    found = surgery.inspect(tmp_path)
    assert time.perf_counter() - started < 20
    assert found.parameters > 6.8e10 and found.modules == 561


@pytest.mark.parametrize("method", ["frod", "smoa", "vera", "hira"])
def test_changes_that_depend_on_the_base_want_it(method: str, llama: Path, tmp_path: Path) -> None:
    if method == "hira":
        trained(load_base(llama), peft.HiraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    else:
        surgery.init(llama, method, tmp_path / "adapter", target=["q_proj"])
    alone = surgery.inspect(tmp_path / "adapter")
    assert alone.modules == 3 and all(site.norm is None for site in alone.sites)
    assert any("--base MODEL" in note for note in alone.notes)
    based = surgery.inspect(tmp_path / "adapter", base=llama, spectra=True)
    assert all(site.norm is not None and site.rank_95 is not None for site in based.sites)
    assert (sum(site.norm or 0 for site in based.sites) > 0) == (method == "hira")


def test_what_is_not_read_is_still_described(llama: Path, tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"])
    found = surgery.inspect(trained(load_base(llama), config, tmp_path / "oft"))
    assert found.modules == 3 and found.parameters > 0 and not found.sites
    assert "rotation" in found.notes[0]


def test_carried_tensors_are_listed(llama: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert surgery.inspect(trained(load_base(llama), config, tmp_path / "lora")).carried == ["lm_head.weight"]


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_pictures(ending: str, lora: Path, model_folder, tmp_path: Path) -> None:
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending]
    for name, path, options in (
        ("lora", lora, {}),
        ("model", model_folder("t5"), {}),
        ("spectra", model_folder("gpt2"), {"spectra": True}),
    ):
        picture = tmp_path / f"{name}{ending}"
        assert surgery.inspect(path, picture, **options).out == str(picture)
        assert picture.read_bytes().startswith(begins) and picture.stat().st_size > 5000
    assert not list(tmp_path.glob(".*"))


def test_a_picture_shows_every_layer_and_role(lora: Path, tmp_path: Path) -> None:
    surgery.inspect(lora, tmp_path / "lora.svg")
    text = (tmp_path / "lora.svg").read_text()
    for words in ("self_attn.q_proj", "mlp.down_proj", "share of the squared norm", "lora: LORA adapter"):
        assert f"<!-- {words}" in text


def test_pictures_leave_pyplot_alone(lora: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = f"import sys, surgery; surgery.inspect({str(lora)!r}, {str(tmp_path / 'x.png')!r}); " + (
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_short_roles() -> None:
    assert short_roles(["model.layers.*.self_attn.q_proj", "lm_head"]) == ["self_attn.q_proj", "lm_head"]
    both = ["encoder.block.*.layer.0.q", "decoder.block.*.layer.0.q"]
    assert short_roles(both) == ["encoder: layer.0.q", "decoder: layer.0.q"]


def test_short_numbers() -> None:
    numbers = [0.0, 0.0123, 4.56, 99.4, 99.6, 108.7, 1234.0, 1e6]
    assert [short_number(number) for number in numbers] == ["0", "0.012", "4.6", "99", "100", "109", "1234", "1e+06"]


def test_bad_input_is_named(lora: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"ends with \.png"):
        surgery.inspect(lora, tmp_path / "lora.gif")
    with pytest.raises(OutputError, match="its folder does not exist"):
        surgery.inspect(lora, tmp_path / "nowhere" / "lora.png")
    with pytest.raises(CheckpointError, match="no such folder"):
        surgery.inspect(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="not an adapter folder"):
        surgery.inspect(tmp_path / "empty")
    with pytest.raises(AdapterError, match="base belongs to an adapter"):
        surgery.inspect(llama, base=llama)
    (lora / FILE).write_bytes((lora / FILE).read_bytes()[:-10])
    with pytest.raises(AdapterError, match="not a complete safetensors file"):
        surgery.inspect(lora)


class TestCommand:
    """`surgery inspect` in the terminal."""

    def test_the_table(self, lora: Path, tmp_path: Path) -> None:
        before = contents(tmp_path)
        result = invoke("inspect", lora, "-v")
        assert result.exit_code == 0 and contents(tmp_path) == before
        for words in ("LORA adapter, CAUSAL_LM", "6 changed", "95 % in", "model.layers.*.mlp.down_proj", "32 x 48"):
            assert words in result.stdout
        assert "model.layers.2.mlp.down_proj" in result.stdout

    def test_json_is_all_there_is_on_stdout(self, lora: Path, tmp_path: Path) -> None:
        result = invoke("inspect", lora, "--json", "--plot", tmp_path / "x.png")
        found = json.loads(result.stdout)
        assert {"command", "out", "bytes", "seconds", "modules"} <= set(found)
        assert found["command"] == "inspect" and found["out"] == str(tmp_path / "x.png") and len(found["sites"]) == 6

    def test_quiet_prints_the_size(self, lora: Path) -> None:
        assert invoke("inspect", lora, "-q").stdout.endswith("iB\n")

    def test_wrong_input_is_one_line_and_exit_1(self, tmp_path: Path) -> None:
        result = invoke("inspect", tmp_path / "nowhere")
        assert result.exit_code == 1 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
