"""Whatever is wrong with a base model: one line that names it, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery.errors import CheckpointError, MethodError
from tests.helpers.bad_input import (
    CONFIG,
    INCOMPLETE,
    INDEX,
    NOT_JSON,
    Q_PROJ,
    READS_WEIGHTS,
    SINGLE,
    WEIGHTS,
    Edit,
    case,
    check_refused,
    configure,
    entry,
    replace_by_file,
    rewrite,
    tensor,
    without_tensor,
    write,
)
from tests.helpers.command_line import invoke

PART = "part-1.safetensors"


def index(value: Any) -> Edit:
    """An index in place of the single file."""

    def edit(folder: Path) -> None:
        (folder / SINGLE).unlink()
        write(INDEX, json.dumps(value))(folder)

    return edit


def shard(name: Any) -> Edit:
    """An index that says `name` holds a weight."""
    return index({"weight_map": {Q_PROJ: name}})


def index_names_lost_tensor(folder: Path) -> None:
    names = load_file(folder / SINGLE)
    without_tensor()(folder)
    (folder / SINGLE).rename(folder / PART)
    write(INDEX, json.dumps({"weight_map": dict.fromkeys(names, PART)}))(folder)


def index_text(text: str) -> Edit:
    """An index of this text in place of the single file."""

    def edit(folder: Path) -> None:
        (folder / SINGLE).unlink()
        write(INDEX, text)(folder)

    return edit


BROKEN_FOLDERS = [
    case("no-such-folder", shutil.rmtree, ("PLACE/model: no such folder",)),
    case("a-file", replace_by_file, ("PLACE/model: is a file",)),
    case("no-config", lambda folder: (folder / CONFIG).unlink(), (CONFIG, "no such file")),
    case("config-not-json", write(CONFIG, "{nope"), (CONFIG, NOT_JSON)),
    case("config-empty", write(CONFIG, ""), (CONFIG, NOT_JSON)),
    case("config-binary", write(CONFIG, b"\xff\xfe\x00"), (CONFIG, NOT_JSON)),
    case("config-too-deep", write(CONFIG, "[" * 100_000), (CONFIG, NOT_JSON)),
    case("config-not-an-object", write(CONFIG, "[1]"), (CONFIG, "expected a JSON object", "list")),
    case("no-architectures", configure(architectures=...), (CONFIG, "architectures", "--task")),
    case("empty-architectures", configure(architectures=[]), (CONFIG, "architectures", "--task")),
    case("unknown-architecture", configure(architectures=["NoSuchModel"]), (CONFIG, "NoSuchModel")),
    case("architecture-of-another-type", configure(architectures=["BertModel"]), (CONFIG, "BertModel")),
    case("architecture-not-a-model", configure(architectures=["LlamaConfig"]), (CONFIG, "LlamaConfig")),
    case("architectures-a-string", configure(architectures="LlamaForCausalLM"), (CONFIG, "architectures")),
    case("architectures-of-numbers", configure(architectures=[1]), (CONFIG, "architectures")),
    case("architectures-an-object", configure(architectures={"a": 1}), (CONFIG, "architectures")),
    case("architecture-a-string-of-transformers", configure(architectures=["__version__"]), (CONFIG, "__version__")),
    case("no-model-type", configure(model_type=...), (CONFIG, "model_type")),
    case("unknown-model-type", configure(model_type="no-such-type"), (CONFIG, "no-such-type")),
    case("size-a-string", configure(hidden_size="wide"), (CONFIG, "hidden_size", "expected int")),
    case("size-negative", configure(hidden_size=-4), (CONFIG, "LlamaForCausalLM")),
    case("heads-do-not-divide", configure(num_attention_heads=5), (CONFIG, "attention heads")),
    case("no-heads", configure(num_attention_heads=0), (CONFIG,)),
    case("more-layers-than-weights", configure(num_hidden_layers=4), ("model.layers.3.self_attn.q_proj", "no weights")),
    case("other-size-than-weights", configure(hidden_size=64), ("model.layers.0.self_attn.q_proj.weight", "(32, 64)")),
    case("no-weights", lambda folder: (folder / SINGLE).unlink(), (SINGLE, INDEX)),
    case(
        "only-a-pickle",
        lambda folder: (folder / SINGLE).rename(folder / "pytorch_model.bin"),
        ("pytorch_model.bin", "pickle", "convert"),
    ),
    case("cut-in-the-middle", rewrite(lambda data: data[: len(data) // 2]), (SINGLE, INCOMPLETE)),
    case("cut-in-the-header", rewrite(lambda data: data[:100]), (SINGLE, INCOMPLETE)),
    case("empty-file", write(SINGLE, b""), (SINGLE, INCOMPLETE)),
    case("garbage-header", rewrite(lambda data: data[:8] + b"x" * 100 + data[108:]), (SINGLE, INCOMPLETE)),
    case("header-length-absurd", rewrite(lambda data: b"\xff" * 7 + b"\x3f" + data[8:]), (SINGLE, INCOMPLETE)),
    case("bytes-too-many", rewrite(lambda data: data + b"more"), (SINGLE, INCOMPLETE)),
    case("git-lfs-pointer", write(SINGLE, "version https://git-lfs.github.com/spec/v1\n"), (SINGLE, INCOMPLETE)),
    case("index-not-json", index_text("{"), (INDEX, NOT_JSON)),
    case("index-without-map", index({"metadata": {}}), (INDEX, "weight_map")),
    case("index-with-empty-map", index({"weight_map": {}}), (INDEX, "weight_map")),
    case("index-with-a-list", index({"weight_map": [Q_PROJ]}), (INDEX, "weight_map")),
    case("index-names-missing-shard", shard("part-2.safetensors"), (INDEX, "part-2.safetensors", "missing")),
    case("index-leads-outside", shard("../x.safetensors"), (INDEX, Q_PROJ, "../x.safetensors")),
    case("index-is-absolute", shard("/x.safetensors"), (INDEX, Q_PROJ, "/x.safetensors")),
    case("index-names-the-parent", shard(".."), (INDEX, "..")),
    case("index-names-a-number", shard(5), (INDEX, Q_PROJ, "5")),
    case("index-names-lost-tensor", index_names_lost_tensor, (PART, Q_PROJ)),
]


@pytest.mark.parametrize(("edit", "words"), BROKEN_FOLDERS)
def test_broken_base_model(edit: Edit, words: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    edit(model)
    (tmp_path / "x.safetensors").write_bytes(b"what an index must not reach")
    check_refused(tmp_path, CheckpointError, words, model)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        case("plain", "no-such-model", ("no-such-model", "no such folder")),
        case("hub-id", "no-such/model", ("no-such/model", "no such folder", "Hub")),
        case("url", "https://huggingface.co/no-such/model", ("https://huggingface.co/no-such/model",)),
        case("too-long", "x" * 300, ("xxx",)),
    ],
)
def test_no_such_model(name: str, words: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(tmp_path, CheckpointError, words, name)


def both_infinities(weight: torch.Tensor) -> torch.Tensor:
    return weight.clone().index_put_((torch.tensor([0, 1]),), torch.tensor([[torch.inf], [-torch.inf]]))


BROKEN_WEIGHTS = {
    "nan": (entry(float("nan")), "NaN or Inf"),
    "inf": (entry(float("inf")), "NaN or Inf"),
    "both-infinities": (tensor(both_infinities), "NaN or Inf"),
    "bfloat16-nan": (tensor(lambda weight: (weight * float("nan")).to(torch.bfloat16)), "NaN or Inf"),
    "shape": (tensor(lambda weight: weight[:-1].clone()), "(31, 32)"),
    "integer": (tensor(lambda weight: weight.to(torch.int8)), "torch.int8"),
}


@pytest.mark.parametrize("kind", list(BROKEN_WEIGHTS))
@pytest.mark.parametrize("method", READS_WEIGHTS)
def test_broken_weight_is_named(method: str, kind: str, model: Path, tmp_path: Path) -> None:
    edit, word = BROKEN_WEIGHTS[kind]
    edit(model)
    check_refused(tmp_path, CheckpointError, ("PLACE/model:", Q_PROJ, word), model, method)


@pytest.mark.parametrize("kind", list(BROKEN_WEIGHTS))
def test_vera_reads_no_weight(kind: str, model: Path, tmp_path: Path) -> None:
    BROKEN_WEIGHTS[kind][0](model)
    assert invoke("init", model, "--method", "vera", "-o", tmp_path / "out", "-q").exit_code == 0
    assert (tmp_path / "out" / WEIGHTS).is_file()


@pytest.mark.parametrize("method", READS_WEIGHTS)
def test_missing_weight_is_named(method: str, model: Path, tmp_path: Path) -> None:
    without_tensor()(model)
    words = ("no weights for model.layers.1.self_attn.q_proj in the checkpoint",)
    check_refused(tmp_path, CheckpointError, words, model, method)


def test_vera_needs_shapes_alone(model: Path, tmp_path: Path) -> None:
    without_tensor()(model)
    assert invoke("init", model, "--method", "vera", "-o", tmp_path / "out", "-q").exit_code == 0


def test_weight_of_transposed_layer_is_named(model_folder, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model_folder("gpt2"), tmp_path / "model"))
    name = next(key for key in load_file(model / SINGLE) if key.endswith("h.1.attn.c_attn.weight"))
    tensor(lambda weight: weight * float("nan"), name)(model)
    check_refused(tmp_path, CheckpointError, ("transformer.h.1.attn.c_attn.weight", "NaN or Inf"), model)


def test_nan_elsewhere_does_no_harm(model: Path, tmp_path: Path) -> None:
    tensor(lambda weight: weight * float("nan"), "model.norm.weight")(model)
    assert invoke("init", model, "--method", "inilora", "-o", tmp_path / "out", "-q").exit_code == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("method", READS_WEIGHTS)
def test_weight_of_another_float_type_is_read(method: str, dtype, model: Path, tmp_path: Path) -> None:
    tensor(lambda weight: weight.to(dtype))(model)
    assert invoke("init", model, "--method", method, "-o", tmp_path / "out", "-q").exit_code == 0


@pytest.mark.parametrize(
    ("method", "size", "options"),
    [
        case("near-the-largest-float32", "inilora", 3e38, {}),
        case("beyond-float16", "frod", 1e9, {"dtype": "float16"}),
        case("alpha-too-small", "inilora", 1.0, {"alpha": 1e-320}),
    ],
)
def test_no_file_holds_nan_or_inf(method: str, size: float, options, model: Path, tmp_path: Path) -> None:
    tensor(lambda weight: torch.full_like(weight, size))(model)
    check_refused(tmp_path, MethodError, ("q_proj",), model, method, **options)
