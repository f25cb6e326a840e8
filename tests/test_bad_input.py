"""Whatever is wrong with the input, options or output place: one line that names it, and nothing left behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import surgery
from surgery.adapters import adapter as adapter_files
from surgery.cli.main import main
from surgery.errors import (
    AdapterError,
    CheckpointError,
    DataError,
    MethodError,
    OutputError,
    SurgeryError,
    TargetError,
    WrongBaseError,
)
from surgery.models.base_model import BaseModel
from surgery.storage.format_version import FORMAT_VERSION
from surgery.storage.safetensors_write import write_tensors
from tests.helpers.command_line import contents, flags, invoke
from tests.helpers.models import edit_tensors, load_base, save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

READS_WEIGHTS = ("frod", "inilora", "smoa")
SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PART = "part-1.safetensors"
LATER, UP_TO = FORMAT_VERSION + 1, f"up to {FORMAT_VERSION}"
WEIGHTS = "adapter_model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"

Edit = Callable[[Path], Any]


def case(name: str, *values: Any, bug: str | None = None) -> Any:
    """One row of a table of cases; `bug` says what is still wrong in surgery."""
    return pytest.param(*values, id=name, marks=[pytest.mark.xfail(strict=True, reason=bug)] if bug else [])


def check_refused(
    place: Path,
    error: type[SurgeryError],
    words: tuple[str, ...],
    model: Path,
    method: str = "inilora",
    out: Path | None = None,
    **options: Any,
) -> None:
    """The library raises `error`, the command line prints it in one line, and nothing in `place` changes."""
    before = contents(place)
    out = out or place / "out"
    with pytest.raises(error) as caught:
        surgery.init(model, method, out, **options)
    assert isinstance(caught.value, error)
    assert contents(place) == before
    result = invoke("init", model, "--method", method, "-o", out, *flags(**options))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"Error: {' '.join(str(caught.value).split())}\n"
    check_words(words, result.stderr, place)
    assert contents(place) == before


def check_words(words: tuple[str, ...], message: str, place: Path) -> None:
    """Every word is in the message; the name of the test, which is part of the path to `place`, does not count."""
    message = message.replace(str(place), "PLACE")
    assert [word for word in words if word not in message] == []


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be broken."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


# What can be wrong with a base model


def write(name: str, data: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def configure(**changes: Any) -> Edit:
    """Change entries of config.json; an ellipsis removes one."""

    def edit(folder: Path) -> None:
        settings = {**json.loads((folder / CONFIG).read_text()), **changes}
        write(CONFIG, json.dumps({key: value for key, value in settings.items() if value is not ...}))(folder)

    return edit


def rewrite(change: Callable[[bytes], bytes], name: str = SINGLE) -> Edit:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def index(value: Any) -> Edit:
    """An index in place of the single file."""

    def edit(folder: Path) -> None:
        (folder / SINGLE).unlink()
        write(INDEX, json.dumps(value))(folder)

    return edit


def shard(name: Any) -> Edit:
    """An index that says `name` holds a weight."""
    return index({"weight_map": {Q_PROJ: name}})


def tensor(change: Callable[[torch.Tensor], torch.Tensor], name: str = Q_PROJ) -> Edit:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name])}))


def without_tensor(name: str = Q_PROJ) -> Edit:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(name))


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


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


NOT_JSON = "cannot be read as JSON"
INCOMPLETE = "not a complete safetensors file"
FIRST_LINE = "says that something is wrong, and cuts off what: it is in the second line of transformers' message"

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


# What can be wrong with a weight


def entry(value: float) -> Edit:
    """Put a value into the last entry of a weight."""
    return tensor(lambda weight: weight.clone().index_put_((torch.tensor(-1), torch.tensor(-1)), torch.tensor(value)))


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


# Quantised checkpoints


QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("kind", list(QUANTISED))
@pytest.mark.parametrize("method", READS_WEIGHTS)
def test_quantised_checkpoint_is_refused(method: str, kind: str, model: Path, tmp_path: Path) -> None:
    configure(quantization_config=QUANTISED[kind])(model)
    words = ("PLACE/model:", "quantised", kind, "give the unquantised model")
    check_refused(tmp_path, CheckpointError, words, model, method)
    check_refused(tmp_path, CheckpointError, words, model, method, dry_run=True)


@pytest.mark.parametrize("kind", list(QUANTISED))
def test_quantised_checkpoint_is_enough_for_vera(kind: str, model: Path, tmp_path: Path) -> None:
    configure(quantization_config=QUANTISED[kind])(model)
    tensor(lambda weight: weight.reshape(-1, 1).to(torch.uint8))(model)  # packed: another shape, no floating point
    assert invoke("init", model, "--method", "vera", "-o", tmp_path / "out", "-q").exit_code == 0


def test_quantised_checkpoint_with_other_names_is_refused_as_such(model: Path, tmp_path: Path) -> None:
    configure(quantization_config={"quant_method": "gptq", "bits": 4})(model)

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name.replace(".weight", ".qweight")] = tensors.pop(name).to(torch.int32)

    edit_tensors(model, pack)
    check_refused(tmp_path, CheckpointError, ("quantised", "gptq"), model)


# Experts whose weights are one 3-D parameter


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("mixtral", tmp_path_factory.mktemp("mixtral") / "model")


@pytest.mark.parametrize("method", ["vera", *READS_WEIGHTS])
def test_fused_experts_are_left_out_and_reported(method: str, mixtral: Path, tmp_path: Path) -> None:
    result = invoke("init", mixtral, "--method", method, "-o", tmp_path / "out", "--json")
    report = json.loads(result.stdout)
    assert [site["module"] for site in report["sites"]] == [
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    experts = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
    refused = report["not_adapted"]
    assert [name for name, reason in refused.items() if "3-D" in reason] == experts
    assert [name for name in refused if name not in experts] == [f"model.layers.{n}.mlp.gate" for n in (0, 1)]
    result = invoke("init", mixtral, "--method", method, "-o", tmp_path / "again")
    assert "and 1 more (fused 3-D expert weights)" in result.stderr and experts[0] in result.stderr


@pytest.mark.parametrize("target", ["gate_up_proj", "experts.down_proj", r".*\.experts\..*", "experts"])
def test_fused_experts_are_refused_by_name(target: str, mixtral: Path, tmp_path: Path) -> None:
    check_refused(
        tmp_path, TargetError, (repr(target), "model.layers.0.mlp.experts"), mixtral, target=["q_proj", target]
    )


# Targets and options


ROLES = ("layers.*.self_attn.q_proj", "layers.*.mlp.down_proj", "lm_head")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        case("nothing", "no_such_layer", ("'no_such_layer' matches no module", "Available", *ROLES)),
        case("empty", "", ("'' matches no module", *ROLES)),
        case("regex-for-nothing", ".*no_such.*", ("'.*no_such.*' matches no module", *ROLES)),
        case("invalid-regex", "(q_proj", ("'(q_proj'", "not a valid regular expression", "position 0")),
        case("embedding", "embed_tokens", ("no linear layer", "model.embed_tokens (Embedding)", *ROLES)),
        case("norm", "input_layernorm", ("no linear layer", "model.layers.0.input_layernorm (LlamaRMSNorm)", *ROLES)),
        case("block", "layers.0", ("no linear layer", "model.layers.0 (LlamaDecoderLayer)", *ROLES)),
        case("part-of-a-name", "proj", ("'proj' matches no module", *ROLES)),
    ],
)
def test_target_that_matches_no_linear(target: str, words: tuple[str, ...], llama: Path, tmp_path: Path) -> None:
    check_refused(tmp_path, TargetError, words, llama, target=[target])
    check_refused(tmp_path, TargetError, words, llama, target=["q_proj", target])


def test_model_without_repeated_blocks(model: Path, tmp_path: Path) -> None:
    configure(num_hidden_layers=0)(model)
    check_refused(tmp_path, TargetError, ("LlamaForCausalLM", "no repeated blocks", "--target", "lm_head"), model)


BAD_OPTIONS = [
    *(
        case(f"{method}-rank-{rank}", method, {"rank": rank}, ("rank", f"got {rank}"))
        for method in ("inilora", "inilora-beta", "smoa", "vera")
        for rank in (0, -1)
    ),
    case("smoa-rank-below-groups", "smoa", {"rank": 2, "groups": 3}, ("rank 2", "3 groups", "at least 3")),
    case("smoa-no-groups", "smoa", {"groups": 0}, ("groups", "0")),
    case("smoa-more-groups-than-values", "smoa", {"rank": 40, "groups": 33}, ("33 groups", "q_proj")),
    *(
        case(f"frod-rate-{rate}", "frod", {"sparse_rate": rate}, ("sparse rate", str(rate)))
        for rate in (-0.1, 1.0, 7.0, float("nan"))
    ),
    *(
        case(f"{method}-alpha-{alpha}", method, {"alpha": alpha}, ("alpha", str(alpha)))
        for method in ("inilora", "inilora-alpha")
        for alpha in (0.0, -3.0, float("nan"), float("inf"))
    ),
    case("seed-too-large", "vera", {"seed": 2**64}, ("seed", str(2**64))),
    case("no-such-device", "vera", {"device": "abacus"}, ("'abacus'", "auto, cpu, cuda")),
    case("device-without-use", "vera", {"device": "meta"}, ("meta", "auto, cpu, cuda")),
    case("mps", "vera", {"device": "mps"}, ("mps", "--device cpu")),
]


@pytest.mark.parametrize(("method", "options", "words"), BAD_OPTIONS)
def test_option_out_of_range(method: str, options, words: tuple[str, ...], llama: Path, tmp_path: Path) -> None:
    check_refused(tmp_path, MethodError, words, llama, method, **options)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_gpu(device: str, llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_refused(tmp_path, MethodError, (device, "not available", "0 CUDA devices"), llama, device=device)


def test_gpu_beyond_the_last(llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_refused(tmp_path, MethodError, ("cuda:2", "2 CUDA devices"), llama, device="cuda:2")


@pytest.mark.parametrize("task", ["image-cls", "masked-lm", "seq2seq-lm"])
def test_task_without_a_class(task: str, llama: Path, tmp_path: Path) -> None:
    check_refused(tmp_path, CheckpointError, (task, "'llama'"), llama, task=task)


CAPPED = {"inilora": [], "inilora-alpha": [], "inilora-beta": [], "smoa": ["--variant", "components"]}


@pytest.mark.parametrize("method", CAPPED)
def test_rank_above_the_layers_is_capped(method: str, llama: Path, tmp_path: Path) -> None:
    more = CAPPED[method]
    result = invoke("init", llama, "--method", method, *more, "--rank", 1000, "-o", tmp_path / "out", "-v")
    assert result.exit_code == 0
    assert result.stderr.startswith("Note: rank 1000 is capped at min(in, out) in 21 of 21 layers (down to 16)\n")
    options = {"variant": more[1]} if more else {}
    _, report = surgery.init(llama, method, rank=20, dry_run=True, **options)
    assert {site.module.split(".")[-1]: site.rank for site in report.sites[:7]} == {
        "q_proj": 20, "k_proj": 16, "v_proj": 16, "o_proj": 20, "gate_proj": 20, "up_proj": 20, "down_proj": 20,
    }  # fmt: skip


def test_rank_of_smoas_blocks_is_free(llama: Path, tmp_path: Path) -> None:
    result = invoke("init", llama, "--method", "smoa", "--variant", "blocks", "--rank", 100, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr.startswith("Note: blocks of 21 of 21 layers have fewer rows or columns than their rank")
    tensors = surgery.Adapter.open(tmp_path / "out").modules["model.layers.0.self_attn.k_proj"]
    assert tensors["smoa_A"].shape == (100, 16) and tensors["smoa_B"].shape == (8, 100)


def test_rank_of_vera_is_free(llama: Path, tmp_path: Path) -> None:
    result = invoke("init", llama, "--method", "vera", "--rank", 1000, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr == ""
    tensors = surgery.Adapter.open(tmp_path / "out").modules
    assert tensors["model.layers.0.self_attn.q_proj"]["vera_lambda_d"].shape == (1000,)


IDLE_OPTIONS = [
    ("vera", {"alpha": 8.0}, "--alpha"),
    ("vera", {"sparse_rate": 0.1}, "--sparse-rate"),
    ("vera", {"groups": 2}, "--groups"),
    ("inilora", {"sparse_rate": 0.1}, "--sparse-rate"),
    ("inilora-beta", {"groups": 2}, "--groups"),
    ("frod", {"rank": 0}, "--rank"),
    ("frod", {"alpha": 8.0}, "--alpha"),
    ("inilora", {"branch_ranks": [4, 4]}, "--branch-ranks"),
    ("giva", {"alpha": 8.0}, "--alpha"),
    ("frod", {"data": "train.jsonl"}, "--data"),
    ("vera", {"samples": 4}, "--samples"),
    ("inilora", {"batch_size": 4}, "--batch-size"),
    ("smoa", {"max_length": 4}, "--max-length"),
    ("vera", {"gradient_checkpointing": True}, "--gradient-checkpointing"),
    ("frod", {"variant": "vr"}, "--variant"),
    ("inilora", {"split": {"q_proj": 2}}, "--split"),
]


@pytest.mark.parametrize(("method", "options", "flag"), IDLE_OPTIONS)
def test_option_that_the_method_does_not_take(method: str, options, flag: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=f"method {method} takes no {next(iter(options))}"):
        surgery.init(llama, method, tmp_path / "out", **options)
    check_usage_error(
        tmp_path, f"method {method} takes no {flag}", "init", llama, "--method", method, *flags(**options)
    )


def check_usage_error(place: Path, word: str, *args: Any) -> None:
    """Exit code 2, one line that begins with `Error: ` after click's hint, and nothing in `place` changes."""
    before = contents(place)
    with contextlib.chdir(place):
        result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert word in errors[0]
    assert contents(place) == before


@pytest.mark.parametrize(
    ("word", "args"),
    [
        case("unknown-method", "'nope' is not one of 'vera', 'giva', 'inilora'", ["init", "model", "--method", "nope"]),
        case("no-model", "'MODEL'", ["init", "--method", "vera"]),
        case("no-method", "'--method'", ["init", "model"]),
        case("two-models", "(other)", ["init", "--method", "vera", "model", "other"]),
        case("unknown-option", "'--nope'", ["init", "--method", "vera", "model", "--nope"]),
        case("rank-not-a-number", "'--rank'", ["init", "--method", "vera", "model", "--rank", "four"]),
        case("alpha-not-a-number", "'--alpha'", ["init", "--method", "inilora", "model", "--alpha", "x"]),
        case("unknown-task", "'--task'", ["init", "--method", "vera", "model", "--task", "nope"]),
        case("unknown-dtype", "'--dtype'", ["init", "--method", "vera", "model", "--dtype", "int8"]),
        case("quiet-and-verbose", "-q and -v exclude each other", ["init", "--method", "vera", "model", "-q", "-v"]),
        case("unknown-command", "'nope'", ["nope"]),
        case("methods-of-something", "(model)", ["methods", "model"]),
    ],
)
def test_usage_error(word: str, args: list[str], model: Path, tmp_path: Path) -> None:
    check_usage_error(tmp_path, word, *args)


def test_library_names_unknown_method_and_dtype(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="unknown method 'nope'; the methods are vera, giva, inilora"):
        surgery.init(llama, "nope", tmp_path / "out")
    with pytest.raises(MethodError, match="unknown dtype 'int8': use float32, bfloat16, float16"):
        surgery.init(llama, "vera", tmp_path / "out", dtype="int8")
    assert contents(tmp_path) == {}


# Data that a loss is computed on


@pytest.fixture
def learner(model: Path) -> Path:
    """The tiny Llama with a tokenizer, to be broken."""
    return save_tokenizer(model)


def as_class(task: str, **settings: Any) -> Edit:
    """Save another class of model in place of the Llama."""

    def edit(folder: Path) -> None:
        if task == "seq-cls":
            config = transformers.LlamaConfig.from_pretrained(folder, **settings)
            transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
        elif task == "bert":
            save_model("bert", folder)
        elif task == "gpt2":
            save_model("gpt2", folder)
        else:
            save_model("vit", folder)
            (folder / "tokenizer.json").unlink()

    return edit


def rows(*found: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda place: write_rows(place / "data.jsonl", found)


def data_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / name).write_bytes(content)
        return place / name

    return make


def empty_folder(place: Path) -> Path:
    (place / "data").mkdir()
    return place / "data"


def nothing(folder: Path) -> None:
    """Leave the model as it is."""


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def bert_without_mask(folder: Path) -> None:
    save_tokenizer(save_model("bert", folder), without=["mask"])


TEXT = {"text": "w5 w6 w7"}
LABELLED = ({**TEXT, "label": 0}, {**TEXT, "label": 1})
BAD_DATA = [
    case("no-such-file", nothing, lambda place: place / "no.jsonl", {}, ("PLACE/no.jsonl: no such data file",)),
    case("other-kind", nothing, data_file("a.pdf", b"x"), {}, ("PLACE/a.pdf", ".jsonl, .json, .txt, .csv, .parquet")),
    case("folder-for-text", nothing, empty_folder, {}, ("PLACE/data: data is read from .jsonl",)),
    *(
        case(f"empty-{kind}", nothing, data_file(f"a.{kind}", b""), {}, (f"PLACE/a.{kind}: is empty",))
        for kind in ("jsonl", "txt", "csv", "parquet")
    ),
    case("blank-lines", nothing, data_file("a.txt", b"\n \n\n"), {}, ("PLACE/a.txt: is empty",)),
    case("header-alone", nothing, data_file("a.csv", b"text,label\n"), {}, ("PLACE/a.csv: is empty",)),
    case("broken-json", nothing, data_file("a.jsonl", b'{"text": "w5"}\n{nope\n'), {}, ("PLACE/a.jsonl", "as json")),
    case("broken-parquet", nothing, data_file("a.parquet", b"PAR1 nope"), {}, ("PLACE/a.parquet", "as parquet")),
    case("no-column", nothing, rows({"body": "w5", "id": 3}), {}, ("columns body, id", "text or prompt + completion")),
    case("half-a-pair", nothing, rows({"prompt": "w5"}), {}, ("has the columns prompt", "prompt + completion")),
    case("text-a-number", nothing, rows({"text": 5}), {}, ("expected text, found int ('5')",)),
    case("text-null", nothing, rows(TEXT, {"text": None}), {}, ("expected text, found NoneType",)),
    case("prompt-null", nothing, rows({"prompt": None, "completion": "w5"}), {}, ("expected text, found NoneType",)),
    case(
        "completion-null", nothing, rows({"prompt": "w5", "completion": None}), {}, ("expected text, found NoneType",)
    ),
    case("nothing-to-learn", nothing, rows({"text": "w5"}), {}, ("none of 1 samples has anything to learn from",)),
    case("no-tokenizer", without_tokenizer, rows(TEXT), {}, ("PLACE/model: has no usable tokenizer",)),
    case("too-long", as_class("gpt2"), rows(TEXT), {"max_length": 33}, ("--max-length 33", "at most 32 tokens")),
    case("too-short", nothing, rows(TEXT), {"max_length": 1}, ("--max-length must be at least 2, got 1",)),
    case("bare-model", as_class("bert"), rows(TEXT), {}, ("BertModel (feature-extraction)", "--task", "masked-lm")),
    case("no-loss", nothing, rows(TEXT), {"task": "token-cls"}, ("token-cls", "has no loss for a data file", "--task")),
    case("no-label", nothing, rows(TEXT), {"task": "seq-cls"}, ("has the columns text", "needs label")),
    case("label-too-large", as_class("seq-cls"), rows({**TEXT, "label": 2}), {}, ("label 2 is none", "2 classes")),
    case("label-null", as_class("seq-cls"), rows(*LABELLED, {**TEXT, "label": None}), {}, ("label None is none",)),
    case(
        "label-text", as_class("seq-cls"), rows({**TEXT, "label": "a"}), {}, ("label 'a' is none", "LABEL_0, LABEL_1")
    ),
    case("label-negative", as_class("seq-cls"), rows({**TEXT, "label": -1}), {}, ("label -1 is none",)),
    case(
        "regression-on-text",
        as_class("seq-cls", num_labels=1),
        rows({**TEXT, "label": "a"}),
        {},
        ("label 'a' is none of the model's 1 classes",),
    ),
    case(
        "new-head-one-label",
        nothing,
        rows(LABELLED[0], LABELLED[0]),
        {"task": "seq-cls"},
        ("has the label 0 alone",),
    ),
    case(
        "new-head-floats",
        nothing,
        rows({**TEXT, "label": 0.5}, {**TEXT, "label": 1.5}),
        {"task": "seq-cls"},
        ("floating-point numbers, not classes",),
    ),
    case(
        "new-head-huge-label",
        nothing,
        rows(LABELLED[0], {**TEXT, "label": 10**9}),
        {"task": "seq-cls"},
        ("2 labels up to 1000000000",),
    ),
    case(
        "new-head-negative",
        nothing,
        rows(LABELLED[0], {**TEXT, "label": -3}),
        {"task": "seq-cls"},
        ("has the label -3", "counted from 0"),
    ),
    case("no-mask", bert_without_mask, rows(TEXT), {"task": "masked-lm"}, ("no mask token",)),
    case("images-no-processor", as_class("vit"), rows(*LABELLED), {}, ("PLACE/model: has no usable image processor",)),
]


@pytest.mark.parametrize(("edit", "make", "options", "words"), BAD_DATA)
def test_bad_data(edit: Edit, make, options, words: tuple[str, ...], learner: Path, tmp_path: Path) -> None:
    edit(learner)
    check_refused(tmp_path, DataError, words, learner, "giva", data=make(tmp_path), **options)


def test_no_data(learner: Path, tmp_path: Path) -> None:
    word = "method giva starts from the gradient of a loss: give its data with --data FILE"
    check_usage_error(tmp_path, word, "init", learner, "--method", "giva")
    with pytest.raises(MethodError, match="with --data FILE"):
        surgery.init(learner, "giva", tmp_path / "out")


BAD_GIVA = [
    case("rank", nothing, {"rank": 0}, MethodError, ("rank", "got 0")),
    case("samples", nothing, {"samples": 0}, MethodError, ("samples must be at least 1, got 0",)),
    case("batch-size", nothing, {"batch_size": -1}, MethodError, ("batch_size must be at least 1, got -1",)),
    case("float16", nothing, {"dtype": "float16"}, MethodError, ("float32 or bfloat16", "would underflow")),
    case(
        "bases-from-the-gradient",
        nothing,
        {"variant": "vru2r", "store_bases": False},
        MethodError,
        ("variant vru2r", "store the bases"),
    ),
    case("split-matches-nothing", nothing, {"split": {"c_attn": 3}}, MethodError, ("split c_attn", "no adapted layer")),
    case(
        "split-does-not-divide",
        nothing,
        {"split": {"q_proj": 3}},
        MethodError,
        ("q_proj has 32 outputs, which 3 does not divide",),
    ),
    case(
        "split-of-other-heights",
        nothing,
        {"split": {"q_proj": [30, 3]}},
        MethodError,
        ("q_proj has 32 outputs, not 30 + 3",),
    ),
    case(
        "split-of-two-kinds",
        nothing,
        {"split": {"self_attn.q_proj": 2, "proj": 2}},
        MethodError,
        ("split proj: no adapted layer",),
    ),
    case("missing-weight", without_tensor(), {}, CheckpointError, ("no weights for model.layers.1.self_attn.q_proj",)),
    case("nan-weight", entry(float("nan")), {}, MethodError, ("the loss is nan on batch 1",)),
    case("other-shape", tensor(lambda weight: weight[:-1].clone()), {}, CheckpointError, ("cannot be loaded",)),
    case("no-such-target", nothing, {"target": ["nope"]}, TargetError, ("'nope' matches no module",)),
]


@pytest.mark.parametrize(("edit", "options", "error", "words"), BAD_GIVA)
def test_giva_refused(edit: Edit, options, error, words: tuple[str, ...], learner: Path, tmp_path: Path) -> None:
    edit(learner)
    data = write_rows(tmp_path / "data.jsonl", text_rows(4))
    check_refused(tmp_path, error, words, learner, "giva", data=data, **options)


def test_quantised_checkpoint_that_cannot_be_loaded_here(learner: Path, tmp_path: Path) -> None:
    """GiVA takes any layer that runs, so what is missing is what transformers says: the package, or the device."""
    configure(quantization_config=QUANTISED["bitsandbytes"])(learner)
    data = write_rows(tmp_path / "data.jsonl", text_rows(4))
    check_refused(
        tmp_path, CheckpointError, ("PLACE/model: cannot be loaded", "bitsandbytes"), learner, "giva", data=data
    )


@pytest.mark.parametrize("value", ["q_proj", "q_proj=", "=3", "q_proj=two", "q_proj=0", "q_proj=16,-16"])
def test_split_that_is_not_understood(value: str, learner: Path, tmp_path: Path) -> None:
    args = ["init", learner, "--method", "giva", "--data", "data.jsonl", "--split", value]
    check_usage_error(tmp_path, f"'--split': {value!r} is not NAME=N or NAME=A,B,C", *args)


def test_output_is_checked_before_the_model_is_loaded(learner: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("surgery.initialization.init.gradient_run", lambda *args, **kwargs: pytest.fail("it was run"))
    occupy(tmp_path / "out")
    data = write_rows(tmp_path / "data.jsonl", text_rows(4))
    check_refused(tmp_path, OutputError, ("--force",), learner, "giva", data=data)


# Where the output cannot go


def occupy(folder: Path) -> Path:
    """Put something at the output that must not be lost."""
    (folder / "sub").mkdir(parents=True)
    (folder / "precious.txt").write_text("precious")
    (folder / "sub" / ".hidden").write_text("hidden")
    return folder


def test_output_that_is_not_empty_is_kept_or_replaced(llama: Path, tmp_path: Path) -> None:
    out = occupy(tmp_path / "out")
    check_refused(tmp_path, OutputError, ("PLACE/out:", "not empty", "-o", "--force"), llama)
    check_refused(tmp_path, OutputError, ("PLACE/out:", "--force"), llama, dry_run=True)
    assert invoke("init", llama, "--method", "inilora", "-o", out, "--force", "-q").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", WEIGHTS, "surgery.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_empty_folder_is_no_hindrance(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert invoke("init", llama, "--method", "vera", "-o", tmp_path / "out", "-q").exit_code == 0


def make_file(place: Path) -> Path:
    (place / "file").write_text("precious")
    return place / "file"


def link_to_folder(place: Path) -> Path:
    occupy(place / "elsewhere")
    (place / "link").symlink_to(place / "elsewhere")
    return place / "link"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        case("file", make_file, ("PLACE/file:", "not a folder")),
        case("below-a-file", lambda place: make_file(place) / "deep" / "out", ("PLACE/file is not a folder",)),
        case("link", link_to_folder, ("PLACE/link:",)),
        case("name-too-long", lambda place: place / ("x" * 300), ("xxx",)),
    ],
)
def test_output_that_cannot_be_a_folder(prepare, words, force: bool, llama: Path, tmp_path: Path) -> None:
    check_refused(tmp_path, OutputError, words, llama, out=prepare(tmp_path), force=force)


def test_parent_without_permission(llama: Path, tmp_path: Path, monkeypatch) -> None:
    access = os.access
    denied = lambda path, mode: False if Path(path) == tmp_path else access(path, mode)  # noqa: E731
    monkeypatch.setattr("surgery.storage.atomic_folder.os.access", denied)
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        check_refused(tmp_path, OutputError, ("out:", "no permission to write in PLACE"), llama, out=out)


def test_parent_that_refuses_a_folder(llama: Path, tmp_path: Path, monkeypatch) -> None:
    mkdir = Path.mkdir

    def denied(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", denied)
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        check_refused(tmp_path, OutputError, ("out:", "Permission denied", "nothing was changed"), llama, out=out)


@pytest.mark.parametrize("out", ["base/model", "base"])
def test_force_never_replaces_the_base_model(out: str, llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "base" / "model"))
    check_refused(tmp_path, OutputError, (f"PLACE/{out}:",), model, out=tmp_path / out, force=True)


@pytest.mark.parametrize(
    ("out", "force"),
    [
        case("itself", ".", False),
        case("above", "..", True),
        case("above-by-its-name", "../../deep", True),
    ],
)
def test_working_directory_is_never_replaced(out: str, force: bool, llama: Path, tmp_path: Path, monkeypatch) -> None:
    here = tmp_path / "deep" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    check_refused(tmp_path, OutputError, (f"Error: {out}:",), llama, out=Path(out), force=force)


def test_finished_run_removes_what_a_killed_one_left(llama: Path, tmp_path: Path) -> None:
    occupy(tmp_path / ".out.partial")
    assert invoke("init", llama, "--method", "vera", "-o", tmp_path / "out", "-q").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# What can go wrong while writing


def fail(error: BaseException) -> Callable[..., None]:
    def act(*args: Any, **kwargs: Any) -> None:
        raise error

    return act


def half_then(act: Callable[..., None]) -> Callable[..., None]:
    """A `write_tensors` that writes half of the file before something happens."""

    def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        write_tensors(path, tensors, metadata)
        os.truncate(path, path.stat().st_size // 2)
        act()

    return save


def flip_byte(offset: int) -> Callable[..., None]:
    """A `write_tensors` on a disk that changes one bit."""

    def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, str]:
        digests = write_tensors(path, tensors, metadata)
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)
        return digests

    return save


LAST_TENSOR = "model.layers.2.self_attn.v_proj.inilora_B0"
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize(
    ("save", "words"),
    [
        case("disk-full", half_then(fail(FULL)), (WEIGHTS, "No space left on device", "nothing was changed")),
        case("data-corrupted", flip_byte(-1), (LAST_TENSOR, "read back differs")),
        case("header-corrupted", flip_byte(20), ("read back",)),
    ],
)
def test_writing_fails(save, words, replaces: bool, llama: Path, tmp_path: Path, monkeypatch) -> None:
    """Whether an older output is replaced, or even the folders above the output are new."""
    monkeypatch.setattr(adapter_files, "write_tensors", save)
    out = occupy(tmp_path / "out") if replaces else tmp_path / "new" / "folders" / "out"
    check_refused(tmp_path, OutputError, ("out:", *words), llama, out=out, force=replaces)


def test_config_is_read_back(llama: Path, tmp_path: Path, monkeypatch) -> None:
    write_json = adapter_files.write_json

    def cut(path: Path, value: Any) -> None:
        write_json(path, value)
        os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(adapter_files, "write_json", cut)
    check_refused(tmp_path, OutputError, ("adapter_config.json", "cannot be read back"), llama)


@contextlib.contextmanager
def small_files_only(size: int) -> Iterator[None]:
    """Let the system refuse to write larger files, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_system_refuses_to_write_more(llama: Path, tmp_path: Path) -> None:
    with small_files_only(8192):
        check_refused(tmp_path, OutputError, ("out", WEIGHTS, "nothing was changed"), llama)


@pytest.fixture
def renaming(monkeypatch) -> Callable[[BaseException | None], None]:
    """A system that cannot swap two folders in one step, on which the second renaming ends in an error."""

    def prepare(error: BaseException | None) -> None:
        rename = os.rename

        def second_fails(source: Path, target: Path) -> None:
            if error is not None and Path(source).name == ".out.partial":
                raise error
            rename(source, target)

        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
        monkeypatch.setattr(os, "rename", second_fails)

    return prepare


def test_output_is_replaced_without_a_swap(renaming, llama: Path, tmp_path: Path) -> None:
    renaming(None)
    out = occupy(tmp_path / "out")
    surgery.init(llama, "vera", out, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert not (out / "precious.txt").exists()
    assert (out / WEIGHTS).is_file()


def test_second_renaming_fails(renaming, llama: Path, tmp_path: Path) -> None:
    renaming(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    out = occupy(tmp_path / "out")
    check_refused(tmp_path, OutputError, ("out:", "Permission denied"), llama, out=out, force=True)


def test_second_renaming_is_interrupted(renaming, llama: Path, tmp_path: Path) -> None:
    renaming(KeyboardInterrupt())
    out = occupy(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        surgery.init(llama, "vera", out, force=True)
    assert contents(tmp_path) == before


# Interruptions


@pytest.fixture
def run_main(monkeypatch, capsys) -> Iterator[Callable[..., tuple[Any, str, str]]]:
    """The console script's entry point in this process: its exit code, stdout and stderr."""
    handler = signal.signal(signal.SIGTERM, fail(AssertionError("main sets no handler for SIGTERM")))

    def run(*args: Any) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["surgery", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)


# Ctrl-C leaves ^C on the terminal, so click begins a new line.
SAID = r"\n?(Interrupted|Terminated); nothing was written\.\n"


def terminate(*args: Any, **kwargs: Any) -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("where", ["reading", "writing"])
@pytest.mark.parametrize(
    ("stop", "code"), [case("ctrl-c", fail(KeyboardInterrupt()), 130), case("sigterm", terminate, 143)]
)
def test_interruption(
    stop, code: int, where: str, replaces: bool, llama: Path, tmp_path: Path, monkeypatch, run_main
) -> None:
    if where == "reading":
        monkeypatch.setattr(BaseModel, "raw_weight", stop)
    else:
        monkeypatch.setattr(adapter_files, "write_tensors", half_then(stop))
    out = occupy(tmp_path / "out") if replaces else tmp_path / "new" / "out"
    before = contents(tmp_path)
    command = ("init", llama, "--method", "inilora", "-o", out, *flags(force=replaces))
    found, stdout, stderr = run_main(*command)
    assert (found, stdout) == (code, "")
    assert re.fullmatch(SAID, stderr)
    assert contents(tmp_path) == before


def test_named_error_ends_the_program_with_1(tmp_path: Path, run_main) -> None:
    code, stdout, stderr = run_main("init", tmp_path, "--method", "vera", "-o", tmp_path / "out", "--json")
    reason = f"{tmp_path / CONFIG}: no such file"
    assert (code, stderr) == (1, f"Error: {reason}\n")
    assert json.loads(stdout) == {"command": "init", "error": reason}


def test_usage_error_ends_the_program_with_2(run_main) -> None:
    code, stdout, stderr = run_main("init", "--method", "vera")
    assert (code, stdout) == (2, "")
    assert stderr.splitlines()[-1] == "Error: Missing argument 'MODEL'."


SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
from surgery.adapters import adapter
from surgery.models import base_model
from surgery.cli.main import main

def wait(*args, **kwargs):
    print("waiting", flush=True)
    time.sleep(60)

def save(path, tensors, metadata):
    path.write_bytes(bytes(1000))
    wait()

if sys.argv.pop(1) == "reading":
    base_model.BaseModel.raw_weight = wait
else:
    adapter.write_tensors = save
main()
"""


@pytest.mark.parametrize(
    ("number", "where", "code"),
    [(signal.SIGINT, "writing", 130), (signal.SIGTERM, "reading", 143)],
)
def test_signal_ends_a_real_process(number, where: str, code: int, llama: Path, tmp_path: Path) -> None:
    out = occupy(tmp_path / "out")
    before = contents(tmp_path)
    command = [sys.executable, "-c", SLOW, where, "init", llama, "--method", "inilora", "-o", out, "--force"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "waiting\n"
            assert (tmp_path / ".out.partial").exists() == (where == "writing")
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == code
    assert stdout == ""
    assert re.fullmatch(SAID, stderr)
    assert contents(tmp_path) == before


# Adapters on the wrong base, and broken adapters


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


def configure_adapter(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        settings = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))

    return edit


def drop_last_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(max(tensors)), WEIGHTS)


def drop_all_tensors(folder: Path) -> None:
    edit_tensors(folder, dict.clear, WEIGHTS)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        case("lacks-one", drop_last_tensor, AdapterError, ("lacks 1 of", "layers.2.self_attn.v_proj.")),
        case("lacks-all", drop_all_tensors, AdapterError, ("the file lacks",)),
        case(
            "from-the-future", configure_adapter(format_version=LATER), AdapterError, (f"version {LATER}", UP_TO, "pip")
        ),
        case("format-not-a-number", configure_adapter(format_version="x"), AdapterError, ("version x", UP_TO)),
    ],
)
@pytest.mark.parametrize(
    ("method", "through"), [*((method, "peft") for method in READS_WEIGHTS), ("smoa", "surgery.load")]
)
def test_broken_adapter(method: str, edit: Edit, error, words, through: str, llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, method, tmp_path / "out")
    edit(tmp_path / "out")
    with pytest.raises(error) as caught:
        if through == "peft":
            PeftModel.from_pretrained(load_base(llama), tmp_path / "out")
        else:
            surgery.load(tmp_path / "out", llama)
    check_words(words, str(caught.value), tmp_path)


@pytest.mark.parametrize("setting", [None, {}])
def test_adapter_without_fingerprint(setting, llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "frod", tmp_path / "out")
    configure_adapter(base_fingerprint=setting)(tmp_path / "out")
    with pytest.raises(AdapterError, match="lacks base_fingerprint"):
        PeftModel.from_pretrained(load_base(llama), tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "edit", "word"),
    [
        case("vera-lacks-one", "vera", drop_last_tensor, "lacks 1 of"),
        case("unknown-type", "inilora", configure_adapter(peft_type="NOPE"), "NOPE"),
        case("rank-of-another-file", "inilora", configure_adapter(r=3), "q_proj"),
    ],
)
def test_adapter_that_load_should_refuse(method: str, edit: Edit, word: str, llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, method, tmp_path / "out")
    edit(tmp_path / "out")
    with pytest.raises(AdapterError, match=word):
        surgery.load(tmp_path / "out", llama)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        case("no-such-folder", shutil.rmtree, CheckpointError, ("no such folder",)),
        case("a-file", replace_by_file, CheckpointError, ("is a file",)),
        case(
            "no-config",
            lambda folder: (folder / "adapter_config.json").unlink(),
            AdapterError,
            ("no adapter_config.json", "not an adapter folder"),
        ),
        case("config-not-json", write("adapter_config.json", "{"), AdapterError, ("adapter_config.json", NOT_JSON)),
        case("config-a-list", write("adapter_config.json", "[]"), AdapterError, ("adapter_config.json", "list")),
        case("no-type", configure_adapter(peft_type=...), AdapterError, ("adapter_config.json", "peft_type")),
        case("no-weights", lambda folder: (folder / WEIGHTS).unlink(), AdapterError, (WEIGHTS,)),
        case(
            "a-pickle-that-is-none",
            lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
            AdapterError,
            ("adapter_model.bin", "cannot be read"),
        ),
        case("weights-cut", rewrite(lambda data: data[: len(data) // 2], WEIGHTS), AdapterError, (WEIGHTS, INCOMPLETE)),
        case("weights-garbage", write(WEIGHTS, "nonsense" * 9), AdapterError, (WEIGHTS, INCOMPLETE)),
        case("provenance-not-json", write("surgery.json", "{"), AdapterError, ("surgery.json", NOT_JSON)),
    ],
)
def test_broken_adapter_folder(edit: Edit, error, words: tuple[str, ...], llama: Path, tmp_path: Path) -> None:
    surgery.init(llama, "vera", tmp_path / "out", rank=4)
    edit(tmp_path / "out")
    with pytest.raises(SurgeryError) as caught:
        surgery.Adapter.open(tmp_path / "out")
    assert isinstance(caught.value, error)
    check_words(("PLACE/out", *words), str(caught.value), tmp_path)
