"""The command line: its help, what goes to stdout and stderr, and that it does what the library call does."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import surgery
from surgery.cli.main import COMMANDS, cli
from surgery.methods.catalogue import MethodInfo
from surgery.methods.registry import method_info, method_infos, method_names
from surgery.models.base_model import BaseModel
from surgery.system.keywords import SHORT_SPELLINGS
from tests.helpers.command_line import contents, flags, invoke
from tests.helpers.models import save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

WEIGHTS = "adapter_model.safetensors"
REPORT_KEYS = {
    "command", "out", "method", "peft_type", "modules", "trainable_parameters", "bytes", "seconds", "sites",
}  # fmt: skip
SITE_KEYS = {"module", "rank", "bytes"}
HEAVY = ("torch", "transformers", "peft", "safetensors", "scipy")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama with a tokenizer; beside it are texts and sentences of three classes."""
    place = tmp_path_factory.mktemp("llama")
    write_rows(place / "texts.jsonl", text_rows(9))
    write_rows(place / "classes.jsonl", text_rows(9, labels=3))
    return save_tokenizer(save_model("llama", place / "model"))


def data_for(method: str, model: Path) -> dict[str, Path]:
    """What a method needs besides the model."""
    return {"data": model.parent / "texts.jsonl"} if method_info(method).reads_gradients else {}


def init(model: Path, method: str, out: Path, *args: Any) -> click.testing.Result:
    """Run `surgery init`, which must succeed."""
    needed = [] if "--data" in str(args) else flags(**data_for(method, model))
    result = invoke("init", model, "--method", method, "-o", out, *needed, *args)
    assert result.exit_code == 0, result.stderr
    return result


def adapter_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def adapted(result: click.testing.Result) -> set[str]:
    """Endings of the names of the adapted layers, from `--json`."""
    return {site["module"].rpartition(".")[2] for site in json.loads(result.stdout)["sites"]}


# Help, versions and imports


@pytest.mark.parametrize(
    "code",
    [
        "import surgery",
        "import surgery.cli",
        *(
            f"import sys; sys.argv[1:] = {args!r}; from surgery.cli import main; main()"
            for args in (
                *(["--help"], ["init", "--help"], ["--version"], ["methods"], ["init", "--method", "nope", "m"]),
                *(["init", "--method", "frod", "no where"], ["merge", "no where", "--base", "m"]),
                *(["convert", "no where", "--to", "lora"], ["inspect", "no where"], ["compare", "no where", "m"]),
                ["train", "no where", "--base", "m", "--data", "d"],
            )
        ),
    ],
)
def test_start_does_not_wait_for_torch(code: str) -> None:
    check = f"import atexit, sys; atexit.register(lambda: print('heavy:', sorted({set(HEAVY)} & set(sys.modules))))\n"
    result = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "heavy: []"
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command: list[str], flag: str) -> None:
    result = invoke(*command, flag)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: {' '.join(['surgery', *command])} ")
    assert "Example" in result.stdout


def test_help_lists_every_command() -> None:
    lines = invoke("--help").stdout.partition("Commands:\n")[2].splitlines()
    described = dict(line.split(maxsplit=1) for line in lines)
    assert list(described) == sorted(COMMANDS)


def command_named(name: str) -> click.Command:
    with click.Context(cli) as context:
        return cli.get_command(context, name)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_has_help(name: str) -> None:
    without = [p.name for p in command_named(name).params if isinstance(p, click.Option) and not (p.help or "").strip()]
    assert without == []


@pytest.mark.parametrize("name", list(COMMANDS))
def test_examples_are_valid_command_lines(name: str) -> None:
    command = command_named(name)
    examples = re.findall(r"^\s+surgery (.*)$", command.help, flags=re.MULTILINE)
    assert examples
    for example in examples:
        first, *args = shlex.split(example)
        assert first == name
        command.make_context(name, args)  # raises a usage error where the example is wrong


def test_a_mistyped_command_is_guessed() -> None:
    result = invoke("inspct", "lora")
    assert result.exit_code == 2 and "No such command 'inspct'; did you mean inspect?" in result.output
    assert "mean" not in invoke("coffee").output


def test_data_without_a_base_names_the_option() -> None:
    result = invoke("convert", "lora", "--to", "giva", "--data", "texts.jsonl")
    assert result.exit_code == 2 and "give it with --base MODEL" in result.output


def test_version_lists_versions() -> None:
    lines = invoke("--version").stdout.splitlines()
    assert lines[0] == f"surgery {surgery.__version__}"
    versions = dict(line.split() for line in lines)
    assert {"torch", "transformers", "peft", "safetensors", "huggingface-hub", "python"} <= set(versions)
    assert versions["torch"] == torch.__version__


# surgery methods


def test_methods_table() -> None:
    result = invoke("methods")
    assert result.stderr == ""
    header, _, *rows = result.stdout.splitlines()
    assert header.split()[:1] == ["method"] and max(map(len, result.stdout.splitlines())) <= 80
    for row, info in zip(rows, method_infos(), strict=False):
        assert row.startswith(info.name) and info.change in row and row.endswith(info.peft_type)
    for info in method_infos():
        assert f"{info.name}: {info.title}, {info.paper}" in rows
        assert f"  trains {info.trains}" in rows and f"  stores {info.stores}" in rows


def test_methods_json() -> None:
    (line,) = invoke("methods", "--json").stdout.splitlines()
    report = json.loads(line)
    assert report["command"] == "methods"
    assert [row["name"] for row in report["methods"]] == method_names()
    fields = {field.name for field in dataclasses.fields(MethodInfo)}
    assert all(set(row) == fields for row in report["methods"])


def test_methods_quiet() -> None:
    assert invoke("methods", "-q").stdout.split() == method_names()


# surgery init: what is printed


@pytest.mark.parametrize("method", method_names())
def test_json_is_all_there_is_on_stdout(method: str, llama: Path, tmp_path: Path) -> None:
    result = init(llama, method, tmp_path / "out", "--json")
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert set(report) >= REPORT_KEYS
    assert report["command"] == "init"
    assert report["out"] == str(tmp_path / "out")
    assert (report["method"], report["peft_type"]) == (method, method_info(method).peft_type)
    assert report["modules"] == len(report["sites"]) == 21
    assert all(set(site) >= SITE_KEYS for site in report["sites"])
    assert report["bytes"] == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert report["trainable_parameters"] == sum(site["parameters"] for site in report["sites"]) > 0
    assert report["seconds"] > 0
    assert adapter_config(tmp_path / "out")["peft_type"] == report["peft_type"]


def test_quiet_prints_only_the_folder(llama: Path, tmp_path: Path) -> None:
    result = init(llama, "smoa", tmp_path / "out", "-q")
    assert (result.stdout, result.stderr) == (f"{tmp_path / 'out'}\n", "")


@pytest.mark.parametrize("task", ["seq-cls", None])
def test_notes_go_to_stderr(task: str | None, llama: Path, tmp_path: Path) -> None:
    result = init(llama, "smoa", tmp_path / "out", *(["--task", task] if task else []))
    notes = [
        "Note: smoa is the published form since 0.2.0: K diagonal blocks, about 1/K of a LoRA's trained numbers; what "
        "0.1.0 made is --variant components",
        "Note: blocks of 6 of 21 layers have fewer rows or columns than their rank, up to 16: a lower --rank trains "
        "fewer numbers with the same freedom there",
    ]
    if task:
        notes.append("Note: the checkpoint has no score: a fresh one, seeded, is saved with the adapter")
    assert result.stderr.splitlines() == notes
    assert "Note" not in result.stdout


def test_summary(llama: Path, tmp_path: Path) -> None:
    result = init(llama, "frod", tmp_path / "out")
    summary = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line.strip())
    assert summary["method"].startswith("FRoD, doi 10.1609/aaai.v40i31.39813: dW = ")
    assert summary["base"] == f"{llama} as LlamaForCausalLM"
    assert summary["layers"] == "21 adapted"
    assert summary["written"] == str(tmp_path / "out")
    _, report = surgery.init(llama, "frod")
    assert summary["trainable"] == f"{report.trainable_parameters:,} parameters"
    assert f'import surgery; PeftModel.from_pretrained(base, "{tmp_path / "out"}"' in result.stdout


def test_verbose_prints_a_row_per_layer(llama: Path, tmp_path: Path) -> None:
    result = init(llama, "inilora", tmp_path / "out", "-v", "--rank", 20)
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("model.layers.")]
    _, report = surgery.init(llama, "inilora", rank=20)
    assert [(row[0], int(row[1]), int(row[3]), int(row[4]), int(row[5].replace(",", ""))) for row in rows] == [
        (site.module, *site.shape, site.rank, site.parameters) for site in report.sites
    ]
    assert "model.layers." not in init(llama, "inilora", tmp_path / "again").stdout


# surgery init: where it writes


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("model", "model-vera"),
        ("model/", "model-vera"),
        ("./deep/model", "model-vera"),
        (".", "here-vera"),
        ("../here", "here-vera"),
        ("deep/..", "here-vera"),
    ],
)
def test_default_output(argument: str, name: str, llama: Path, tmp_path: Path, monkeypatch) -> None:
    here = shutil.copytree(llama, tmp_path / "here")
    for folder in ("model", "deep/model"):
        shutil.copytree(llama, here / folder)
    monkeypatch.chdir(here)
    before = set(contents(here))
    result = invoke("init", argument, "--method", "vera", "-q")
    assert result.stdout == f"{name}\n"
    files = {f"{name}/{file}" for file in ("adapter_config.json", WEIGHTS, "surgery.json")}
    assert set(contents(here)) - before == {name, *files}


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("org/name", "name-vera"),
        ("org/name@v1.0", "name-vera"),
        ("org/name@refs/pr/1", "name-vera"),
    ],
)
def test_default_output_of_a_hub_id(argument: str, name: str, llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("surgery.models.base_model.local_folder", lambda model: llama)
    monkeypatch.chdir(tmp_path)
    assert invoke("init", argument, "--method", "vera", "-q").stdout == f"{name}\n"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("out", ["new", "new/", "new/folders/out", "../beside"])
def test_output_folder_is_created(out: str, llama: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    init(llama, "vera", Path(out))
    assert (tmp_path / "here" / out / WEIGHTS).is_file()


@pytest.mark.parametrize("method", method_names())
def test_dry_run_writes_nothing(method: str, llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(BaseModel, "raw_weight", lambda *args, **kwargs: pytest.fail("a weight was read"))
    shown = init(llama, method, tmp_path / "out", "--dry-run").stdout
    report = json.loads(init(llama, method, tmp_path / "out", "--dry-run", "--json").stdout)
    assert contents(tmp_path) == {}
    assert "nothing written" in shown and "would be" in shown and "from_pretrained" not in shown
    assert report["dry_run"] is True
    monkeypatch.undo()
    done = json.loads(init(llama, method, tmp_path / "out", "--json").stdout)
    for site in [*report["sites"], *done["sites"]]:
        del site["captured"]  # depends on the weights
    for key in ("modules", "trainable_parameters", "sites", "method", "peft_type"):
        assert report[key] == done[key]


# surgery init: its options


@pytest.mark.parametrize(
    ("targets", "roles"),
    [
        ([], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["self_attn.q_proj", "lm_head"], {"q_proj", "lm_head"}),
        ([r".*\.(gate|up)_proj"], {"gate_proj", "up_proj"}),
        ([r".*\.gate_.*", "k_proj"], {"gate_proj", "k_proj"}),
        (
            ["all-linear", "lm_head"],
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"},
        ),
    ],
)
def test_target(targets: list[str], roles: set[str], llama: Path, tmp_path: Path) -> None:
    assert adapted(init(llama, "vera", tmp_path / "out", "--json", *flags(target=targets))) == roles
    assert set(adapter_config(tmp_path / "out")["target_modules"]) == roles


def test_target_in_one_layer(llama: Path, tmp_path: Path) -> None:
    result = init(llama, "inilora", tmp_path / "out", "--json", "--target", r"model\.layers\.1\..*_proj")
    modules = [site["module"] for site in json.loads(result.stdout)["sites"]]
    assert len(modules) == 7
    assert all(module.startswith("model.layers.1.") for module in modules)
    names = surgery.Adapter.open(tmp_path / "out").modules
    assert set(names) == set(modules)


@pytest.mark.parametrize(
    ("kind", "task", "task_type", "heads"),
    [
        ("llama", None, "CAUSAL_LM", None),
        ("llama", "causal-lm", "CAUSAL_LM", None),
        ("llama", "feature-extraction", None, None),
        ("llama", "token-cls", "TOKEN_CLS", ["score"]),
        ("bert", None, None, None),
        ("bert", "seq-cls", "SEQ_CLS", ["classifier"]),
        ("bert", "masked-lm", None, None),
        ("bert", "question-answering", "QUESTION_ANS", ["qa_outputs"]),
        ("t5", None, "SEQ_2_SEQ_LM", None),
        ("vit", None, None, ["classifier"]),
    ],
)
def test_task(kind: str, task: str | None, task_type: str | None, heads, model_folder, tmp_path: Path) -> None:
    init(model_folder(kind), "vera", tmp_path / "out", *(["--task", task] if task else []))
    config = adapter_config(tmp_path / "out")
    assert config["task_type"] == task_type
    assert config["modules_to_save"] == heads
    assert set(heads or []) <= set(surgery.Adapter.open(tmp_path / "out").modules)


@pytest.mark.parametrize("method", [info.name for info in method_infos() if "store_bases" in info.options])
def test_no_store_bases(method: str, llama: Path, tmp_path: Path) -> None:
    stored = json.loads(init(llama, method, tmp_path / "stored", "--json").stdout)
    bare = json.loads(init(llama, method, tmp_path / "bare", "--json", "--no-store-bases").stdout)
    # What SMoA leaves out is a bit for each row and column, which on layers this small a digest takes too.
    assert bare["bytes"] < (1.01 if method == "smoa" else 0.8) * stored["bytes"]
    assert bare["trainable_parameters"] == stored["trainable_parameters"]
    key = "save_projection" if method == "vera" else "store_bases"
    assert (adapter_config(tmp_path / "stored")[key], adapter_config(tmp_path / "bare")[key]) == (True, False)


def test_dtype(llama: Path, tmp_path: Path) -> None:
    for name in ("float32", "bfloat16", "float16"):
        init(llama, "inilora", tmp_path / name, "--dtype", name)
        tensors = surgery.Adapter.open(tmp_path / name).tensors.values()
        assert {tensor.dtype for tensor in tensors} == {getattr(torch, name)}


# The command line and the library


def test_options_are_the_words_of_the_library_call() -> None:
    parameters = inspect.signature(surgery.init).parameters
    full = {short: name for name, short in SHORT_SPELLINGS.items()}
    options = {full.get(str(each.name), each.name): each for each in command_named("init").params}
    for name in ("as_json", "quiet", "verbose"):
        del options[name]
    assert set(options) == set(parameters) - {"progress", "loss"}
    defaults = {name: getattr(option, "default", None) for name, option in options.items()}
    for name in ("device", "dtype", "seed"):
        assert defaults[name] == parameters[name].default


LIBRARY_CALLS = [
    ("vera", {"rank": 4, "seed": 7, "target": ["q_proj", "v_proj"]}),
    ("inilora", {"rank": 4, "alpha": 2.5, "dtype": "bfloat16"}),
    ("inilora", {"store_bases": False, "target": [".*_proj"]}),
    ("inilora-beta", {"seed": 3}),
    ("frod", {"sparse_rate": 0.05, "seed": 1}),
    ("frod", {"store_bases": False}),
    ("smoa", {"rank": 9, "groups": 3, "task": "seq-cls"}),
    ("smoa", {"branch_ranks": [5, 3], "alpha": 4.0, "store_bases": False}),
    ("smoa", {"variant": "components", "groups": 3}),
    ("giva", {"rank": 4, "variant": "vru2r", "samples": 5, "batch_size": 2, "max_length": 8, "seed": 2}),
    ("giva", {"store_bases": False, "gradient_checkpointing": True, "dtype": "bf16"}),
    ("giva", {"variant": "vrurand", "split": {"gate_proj": 2, "down_proj": [20, 12]}, "target": [".*mlp.*"]}),
]


@pytest.mark.parametrize(("method", "options"), LIBRARY_CALLS)
def test_command_equals_library_call_and_itself(method: str, options, llama: Path, tmp_path: Path) -> None:
    for name in ("once", "twice"):
        init(llama, method, tmp_path / name, *flags(**options))
    surgery.init(llama, method, tmp_path / "library", **options, **data_for(method, llama))
    files = contents(tmp_path / "library")
    assert set(files) == {"adapter_config.json", WEIGHTS, "surgery.json"}
    for name in ("once", "twice"):
        assert contents(tmp_path / name)[WEIGHTS] == files[WEIGHTS]
        assert contents(tmp_path / name) == files


@pytest.mark.parametrize("method", method_names())
def test_seed_matters_where_something_is_drawn(method: str, llama: Path, tmp_path: Path) -> None:
    """The control for the equalities above."""
    for seed in (0, 1):
        init(llama, method, tmp_path / str(seed), "--seed", seed)
    same = contents(tmp_path / "0")[WEIGHTS] == contents(tmp_path / "1")[WEIGHTS]
    assert same == (method == "inilora")


def test_summary_of_giva(llama: Path, tmp_path: Path) -> None:
    """What it learnt from, and how many labels a new head has."""
    data = ["--data", llama.parent / "classes.jsonl", "--task", "seq-cls", "--samples", "4"]
    result = init(llama, "giva", tmp_path / "out", *data)
    assert re.search(r"^loss +\d\.\d{4} on 4 samples, whose gradient chose A$", result.stdout, re.MULTILINE)
    assert "Its head has 3 outputs: load the base with num_labels=3" in result.stdout
    assert 'import surgery; PeftModel.from_pretrained(base, "' in result.stdout
    assert result.stderr == "Note: the checkpoint has no score: a fresh one, seeded, is saved with the adapter\n"
    report = json.loads(init(llama, "giva", tmp_path / "again", *data, "--json").stdout)
    assert (report["samples"], report["labels"], report["modules"]) == (4, 3, 21)
    assert report["loss"] > 0
    history = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert (history["data"], history["labels"], history["options"]["samples"]) == ("classes.jsonl", [0, 1, 2], 4)
    assert str(llama.parent) not in json.dumps(history)


def test_real_process(llama: Path, tmp_path: Path) -> None:
    """The console script: nothing but the result on stdout, nothing of the libraries on stderr, the same file."""
    code = "from surgery.cli import main; main()"
    command = [sys.executable, "-c", code, "init", llama, "--method", "smoa", "-o", "out", "--json"]
    # One thread, as in the tests' own process.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report["out"] == "out"
    surgery.init(llama, "smoa", tmp_path / "library")
    assert contents(tmp_path / "out") == contents(tmp_path / "library")
    assert report["bytes"] == (tmp_path / "out" / WEIGHTS).stat().st_size
