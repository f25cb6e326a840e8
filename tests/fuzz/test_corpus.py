"""Broken inputs that were once answered with anything but one clear line: found by the fuzzer, made again by code."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.campaign import faults_of
from tests.fuzz.specimens import ELSEWHERE, make_specimens
from tests.fuzz.tensors import join, split
from tests.helpers.command_line import contents, invoke
from tests.helpers.isolated import Outcome

WEIGHTS, CONFIG, ADAPTER_CONFIG = "adapter_model.safetensors", "config.json", "adapter_config.json"
NORM = "model.layers.0.input_layernorm.weight"
V_PROJ = "model.layers.0.self_attn.v_proj.weight"
INDEX = "model.safetensors.index.json"
SECONDS = 60

Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def specimens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole folders of every kind."""
    folder = tmp_path_factory.mktemp("specimens")
    make_specimens(folder)
    return folder


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """End what waits for a pipe, or has no end."""

    def stop(*args: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def write(name: str, data: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def configure(name: str = ADAPTER_CONFIG, **changes: Any) -> Edit:
    """Change entries of a configuration; an ellipsis removes one."""

    def edit(folder: Path) -> None:
        settings = {**json.loads((folder / name).read_text()), **changes}
        write(name, json.dumps({key: value for key, value in settings.items() if value is not ...}))(folder)

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], name: str = WEIGHTS) -> Edit:
    def edit(folder: Path) -> None:
        found = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        change(found)
        save_file(found, folder / name, metadata={"format": "pt"})

    return edit


def each(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Change the first tensor whose name ends so."""

    def edit(found: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(found) if name.endswith(ending))
        found[name] = change(found[name]).contiguous()

    return tensors(edit)


def without(ending: str) -> Edit:
    return tensors(lambda found: found.pop(next(name for name in sorted(found) if name.endswith(ending))))


def header(change: Callable[[dict[str, Any]], Any], name: str = WEIGHTS) -> Edit:
    def edit(folder: Path) -> None:
        found, body = split(folder / name)
        change(found)
        join(folder / name, found, body)

    return edit


def pipe(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


def link(name: str, target: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return edit


def other_vocabulary(folder: Path) -> None:
    """A tokenizer whose words have numbers that the model has no rows for."""
    found = json.loads((folder / "tokenizer.json").read_text())
    found["model"]["vocab"] = {word: number + 100 for word, number in found["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(found))


def no_numbers(name: str) -> Edit:
    return tensors(lambda found: found[name].fill_(float("nan")), "model.safetensors")


def folder_of_an_adapter(folder: Path) -> None:
    """A folder that is an adapter, under the name of the configuration."""
    (folder / ADAPTER_CONFIG).rename(folder / "kept")
    (folder / ADAPTER_CONFIG).mkdir()
    (folder / "kept").rename(folder / ADAPTER_CONFIG / ADAPTER_CONFIG)


DATA = "init {model} --method giva --data {data} --rank 2 -o {out}"
MERGE = "merge {adapter} --base {model} -o {out}"
CONVERT = "convert {adapter} --to giva --base {model} --rank 1 -o {out}"
INIT = "init {model} --method inilora --rank 2 -o {out}"
INSPECT = "inspect {adapter}"
TRAIN = "train {adapter} --base {model} --data {data} --dry-run"
PUSH = "push {adapter} org/name --dry-run --base-model org/base"
LEARN = "train {adapter} --base {model} --data {data} --steps 1 --batch-size 2 -o {out}"
MEASURE = "convert {adapter} --to giva --base {model} --data {data} --samples 4 --rank 1 -o {out}"
NO_FILE = "is a pipe, a socket or a device, not a file"


def case(name: str, kind: str, command: str, edit: Edit, *words: str) -> Any:
    """A row: what is broken (an adapter of a kind, or `model`), the command over it, and what its error says."""
    return pytest.param(kind, command, edit, words, id=name)


CASES = [
    case("pipe-for-a-configuration", "model", INIT, pipe(CONFIG), CONFIG, NO_FILE),
    case("pipe-for-weights", "lora", INSPECT, pipe(WEIGHTS), WEIGHTS, NO_FILE),
    case("pipe-that-a-library-opens", "model", TRAIN, pipe("generation_config.json"), NO_FILE),
    case("device-without-an-end", "model", INIT, link(CONFIG, "/dev/zero"), CONFIG, NO_FILE),
    case("link-to-itself", "lora", INSPECT, link(ADAPTER_CONFIG, ADAPTER_CONFIG), "no adapter_config.json"),
    case("number-of-5000-digits", "model", INIT, write(CONFIG, '{"a": ' + "9" * 5000 + "}"), CONFIG, "as JSON"),
    case(
        "more-layers-than-any", "model", INIT, configure(CONFIG, num_hidden_layers=2**40), "num_hidden_layers is 10995"
    ),
    case("more-layers-than-weights", "model", INIT, configure(CONFIG, num_hidden_layers=9000), "more than"),
    case("no-numbers-to-train-on", "model", LEARN, no_numbers(V_PROJ), "the base model's", V_PROJ, "not finite"),
    case("no-numbers-to-measure", "model", MEASURE, no_numbers(NORM), "not finite"),
    case("layers-without-number", "model", INIT, configure(CONFIG, num_hidden_layers=float("nan")), "is nan"),
    case("more-labels-than-any", "model", INIT, configure(CONFIG, num_labels=10**9), "num_labels is 1000000000"),
    case("nested-too-deep", "model", INIT, configure(CONFIG, x=json.loads("[" * 200 + "]" * 200)), "nested more than"),
    case("targets-of-numbers", "lora", TRAIN, configure(target_modules=[1]), "target_modules is [1], expected"),
    case("rank-of-text", "inilora", INSPECT, configure(r="8"), "r is '8', expected a whole number"),
    case("rank-without-end", "lora", INSPECT, configure(r=float("inf")), "r is inf, expected a whole number"),
    case("saved-modules-of-text", "lora", MERGE, configure(modules_to_save="x"), "modules_to_save is 'x', expected"),
    case("variant-of-a-list", "inilora", TRAIN, configure(variant=["svd"]), "adapter_config.json", "variant"),
    case("task-of-no-kind", "inilora-on-base", CONVERT, configure(task_type="."), "adapter_config.json", "task type"),
    case("layer-lacks-a-base", "inilora", PUSH, without("inilora_B0"), "the file lacks inilora_B0"),
    case("layer-lacks-a-vector", "giva", PUSH, without("giva_o"), "the file lacks giva_o"),
    case(
        "bases-left-out-by-a-list", "inilora-on-base", "convert {adapter} --to giva --rank 1 -o {out}",
        configure(store_bases=[float("inf")]), "store_bases",
    ),
    case("base-of-whole-numbers", "inilora", MERGE, each("_B0", lambda t: t.to(torch.int8)), "B0 is torch.int8"),
    case("complex-numbers", "frod", MERGE, each("_l", lambda t: t.to(torch.complex64)), "complex numbers"),
    case("places-twice", "frod", MERGE, each("_positions", lambda t: t[:1].expand(t.shape)), "names a place twice"),
    case("places-outside", "frod", MERGE, each("_positions", lambda t: t - 10**6), "places outside of a matrix"),
    case("basis-without-inverse", "frod", MERGE, each("_V", torch.zeros_like), "has no inverse"),
    case("basis-that-is-no-square", "frod", MERGE, each("_V", lambda t: t[:-1]), "frod_portable_V"),
    case("cuts-outside", "smoa-components", MERGE, each("_cuts", lambda t: t + 10**6), "smoa_cuts"),
    case("order-that-is-none", "smoa", MERGE, each("_order", lambda t: t - 10**6), "smoa_order"),
    case("order-of-other-blocks", "smoa", MERGE, each("_order", torch.zeros_like), "smoa_order divides"),
    case("order-of-numbers", "smoa", MERGE, each("_order", lambda t: t.float()), "smoa_order is torch.float32"),
    case("ranks-of-another-sum", "smoa", MERGE, configure(branch_ranks=[1, 2]), "branch ranks"),
    case("variant-that-is-none", "smoa", MERGE, configure(variant="rings"), "not 'rings'"),
    case("projections-too-small", "vera", MERGE, each("vera_A", lambda t: t[:, :3]), "do not fit a weight of"),
    case("tokens-that-the-model-lacks", "model", DATA, other_vocabulary, "the model has 61: it is of another model"),
    case(
        "tokenizer-of-no-length", "model", DATA, configure("tokenizer_config.json", model_max_length=[[0]]),
        "its tokenizer does not work",
    ),
    case("generation-of-null", "model", DATA, write("generation_config.json", "null"), "cannot be loaded"),
    case(
        "history-nested-deep", "inilora", PUSH, configure("surgery.json", task=json.loads("[" * 500 + "]" * 500)),
        "surgery.json: is nested more than 64 deep",
    ),
    case(
        "weights-of-complex-numbers", "model", MERGE,
        tensors(lambda found: found.update({V_PROJ: found[V_PROJ].to(torch.complex64)}), "model.safetensors"),
        "is torch.complex64, not floating point",
    ),
    case(
        "targets-that-are-a-number", "on-experts", CONVERT, configure(target_parameters=5),
        "target_parameters is 5, expected a list of names",
    ),
    case(
        "experts-of-which-one-is-missing", "experts", CONVERT,
        tensors(lambda found: found.pop("model.layers.1.mlp.experts.1.gate_proj.weight"), "model.safetensors"),
        "do not go together: one is missing or of another shape",
    ),
    case("kind-of-mlx-that-is-a-table", "mlx", MERGE, configure(fine_tune_type={"a": 1}), "fine_tune_type {'a': 1}"),
    case("mapping-that-is-a-number", "delora", PUSH, configure(auto_mapping=-5), "auto_mapping is -5, expected"),
    case("bias-that-is-a-list", "lora", CONVERT, configure(bias=["none"]), "bias is ['none'], expected a name"),
    case("configuration-that-is-a-folder", "lora", CONVERT, folder_of_an_adapter, "no adapter_config.json"),
    case("other-weights", "model", MERGE, configure(CONFIG, transformers_weights="x.safetensors"), "other weights"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "command", "edit", "words"), CASES)
def test_corpus(kind: str, command: str, edit: Edit, words: tuple[str, ...], specimens: Path, tmp_path: Path) -> None:
    adapter = {"model": "lora", "experts": "on-experts"}.get(kind, kind)
    for name, source in (("adapter", adapter), ("model", ELSEWHERE.get(adapter, "model"))):
        shutil.copytree(specimens / source, tmp_path / name)
    edit(tmp_path / ("adapter" if kind == adapter else "model"))
    names = {name: str(tmp_path / name) for name in ("adapter", "model", "out")}
    arguments = [word.format(**names, data=specimens / "data.jsonl") for word in command.split()]
    before = contents(tmp_path)
    with time_limit(SECONDS):
        result = invoke(*arguments)
    assert faults_of(Outcome(result.exit_code, result.stdout, result.stderr)) == []
    assert result.exit_code == 1
    assert [word for word in words if word not in result.stderr.replace(str(tmp_path), "PLACE")] == [], result.stderr
    assert contents(tmp_path) == before


def test_an_index_that_tells_nothing_of_its_files(specimens: Path, tmp_path: Path) -> None:
    """What stands in place of its metadata is no reason to refuse a model; the result's index has its own."""
    shutil.copytree(specimens / "sharded", tmp_path / "model")
    configure(INDEX, metadata=3)(tmp_path / "model")
    arguments = ["merge", specimens / "lora", "--base", tmp_path / "model", "-o", tmp_path / "out"]
    assert invoke(*arguments).exit_code == 0
    size = sum(
        tensor.nbytes for path in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(path).values()
    )
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"] == {"total_size": size}


def test_what_is_whole_is_accepted(specimens: Path, tmp_path: Path) -> None:
    """The control: the same commands on whole folders."""
    names = {"adapter": specimens / "lora", "model": specimens / "model", "data": specimens / "data.jsonl"}
    for number, command in enumerate((MERGE, CONVERT, INIT, INSPECT, TRAIN, LEARN, MEASURE, PUSH)):
        arguments = [word.format(**names, out=tmp_path / str(number)) for word in command.split()]
        assert invoke(*arguments).exit_code == 0
