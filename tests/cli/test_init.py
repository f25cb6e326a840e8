"""surgery init: its summary, its default output, and that it does what the library call does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import click
import pytest
import torch

import surgery
from surgery.methods.registry import method_infos, method_names
from surgery.models.base_model import BaseModel
from tests.helpers.command_line import contents, flags, invoke
from tests.helpers.init_runs import WEIGHTS, adapter_config, data_for, init


def test_summary(texted_llama: Path, tmp_path: Path) -> None:
    result = init(texted_llama, "frod", tmp_path / "out")
    summary = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line.strip())
    assert summary["method"].startswith("FRoD, doi 10.1609/aaai.v40i31.39813: dW = ")
    assert summary["base"] == f"{texted_llama} as LlamaForCausalLM"
    assert summary["layers"] == "21 adapted"
    assert summary["written"] == str(tmp_path / "out")
    _, report = surgery.init(texted_llama, "frod")
    assert summary["trainable"] == f"{report.trainable_parameters:,} parameters"
    assert f'import surgery; PeftModel.from_pretrained(base, "{tmp_path / "out"}"' in result.stdout


def test_verbose_prints_a_row_per_layer(texted_llama: Path, tmp_path: Path) -> None:
    result = init(texted_llama, "inilora", tmp_path / "out", "-v", "--rank", 20)
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("model.layers.")]
    _, report = surgery.init(texted_llama, "inilora", rank=20)
    assert [(row[0], int(row[1]), int(row[3]), int(row[4]), int(row[5].replace(",", ""))) for row in rows] == [
        (site.module, *site.shape, site.rank, site.parameters) for site in report.sites
    ]
    assert "model.layers." not in init(texted_llama, "inilora", tmp_path / "again").stdout


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("org/name", "name-vera"),
        ("org/name@v1.0", "name-vera"),
        ("org/name@refs/pr/1", "name-vera"),
    ],
)
def test_default_output_of_a_hub_id(argument: str, name: str, texted_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("surgery.models.base_model.local_folder", lambda model: texted_llama)
    monkeypatch.chdir(tmp_path)
    assert invoke("init", argument, "--method", "vera", "-q").stdout == f"{name}\n"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("out", ["new", "new/", "new/folders/out", "../beside"])
def test_output_folder_is_created(out: str, texted_llama: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    init(texted_llama, "vera", Path(out))
    assert (tmp_path / "here" / out / WEIGHTS).is_file()


@pytest.mark.parametrize("method", method_names())
def test_dry_run_writes_nothing(method: str, texted_llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(BaseModel, "raw_weight", lambda *args, **kwargs: pytest.fail("a weight was read"))
    shown = init(texted_llama, method, tmp_path / "out", "--dry-run").stdout
    report = json.loads(init(texted_llama, method, tmp_path / "out", "--dry-run", "--json").stdout)
    assert contents(tmp_path) == {}
    assert "nothing written" in shown and "would be" in shown and "from_pretrained" not in shown
    assert report["dry_run"] is True
    monkeypatch.undo()
    done = json.loads(init(texted_llama, method, tmp_path / "out", "--json").stdout)
    for site in [*report["sites"], *done["sites"]]:
        del site["captured"]  # depends on the weights
    for key in ("modules", "trainable_parameters", "sites", "method", "peft_type"):
        assert report[key] == done[key]


def test_target_in_one_layer(texted_llama: Path, tmp_path: Path) -> None:
    result = init(texted_llama, "inilora", tmp_path / "out", "--json", "--target", r"model\.layers\.1\..*_proj")
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
def test_no_store_bases(method: str, texted_llama: Path, tmp_path: Path) -> None:
    stored = json.loads(init(texted_llama, method, tmp_path / "stored", "--json").stdout)
    bare = json.loads(init(texted_llama, method, tmp_path / "bare", "--json", "--no-store-bases").stdout)
    # What SMoA leaves out is a bit for each row and column, which on layers this small a digest takes too.
    assert bare["bytes"] < (1.01 if method == "smoa" else 0.8) * stored["bytes"]
    assert bare["trainable_parameters"] == stored["trainable_parameters"]
    key = "save_projection" if method == "vera" else "store_bases"
    assert (adapter_config(tmp_path / "stored")[key], adapter_config(tmp_path / "bare")[key]) == (True, False)


def test_dtype(texted_llama: Path, tmp_path: Path) -> None:
    for name in ("float32", "bfloat16", "float16"):
        init(texted_llama, "inilora", tmp_path / name, "--dtype", name)
        tensors = surgery.Adapter.open(tmp_path / name).tensors.values()
        assert {tensor.dtype for tensor in tensors} == {getattr(torch, name)}


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
def test_command_equals_library_call_and_itself(method: str, options, texted_llama: Path, tmp_path: Path) -> None:
    for name in ("once", "twice"):
        init(texted_llama, method, tmp_path / name, *flags(**options))
    surgery.init(texted_llama, method, tmp_path / "library", **options, **data_for(method, texted_llama))
    files = contents(tmp_path / "library")
    assert set(files) == {"adapter_config.json", WEIGHTS, "surgery.json"}
    for name in ("once", "twice"):
        assert contents(tmp_path / name)[WEIGHTS] == files[WEIGHTS]
        assert contents(tmp_path / name) == files


@pytest.mark.parametrize("method", method_names())
def test_seed_matters_where_something_is_drawn(method: str, texted_llama: Path, tmp_path: Path) -> None:
    """The control for the equalities above."""
    for seed in (0, 1):
        init(texted_llama, method, tmp_path / str(seed), "--seed", seed)
    same = contents(tmp_path / "0")[WEIGHTS] == contents(tmp_path / "1")[WEIGHTS]
    assert same == (method == "inilora")


def test_summary_of_giva(texted_llama: Path, tmp_path: Path) -> None:
    """What it learnt from, and how many labels a new head has."""
    data = ["--data", texted_llama.parent / "classes.jsonl", "--task", "seq-cls", "--samples", "4"]
    result = init(texted_llama, "giva", tmp_path / "out", *data)
    assert re.search(r"^loss +\d\.\d{4} on 4 samples, whose gradient chose A$", result.stdout, re.MULTILINE)
    assert "Its head has 3 outputs: load the base with num_labels=3" in result.stdout
    assert 'import surgery; PeftModel.from_pretrained(base, "' in result.stdout
    assert result.stderr == "Note: the checkpoint has no score: a fresh one, seeded, is saved with the adapter\n"
    report = json.loads(init(texted_llama, "giva", tmp_path / "again", *data, "--json").stdout)
    assert (report["samples"], report["labels"], report["modules"]) == (4, 3, 21)
    assert report["loss"] > 0
    history = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert (history["data"], history["labels"], history["options"]["samples"]) == ("classes.jsonl", [0, 1, 2], 4)
    assert str(texted_llama.parent) not in json.dumps(history)


def adapted(result: click.testing.Result) -> set[str]:
    """Endings of the names of the adapted layers, from `--json`."""
    return {site["module"].rpartition(".")[2] for site in json.loads(result.stdout)["sites"]}


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
def test_default_output(argument: str, name: str, texted_llama: Path, tmp_path: Path, monkeypatch) -> None:
    here = shutil.copytree(texted_llama, tmp_path / "here")
    for folder in ("model", "deep/model"):
        shutil.copytree(texted_llama, here / folder)
    monkeypatch.chdir(here)
    before = set(contents(here))
    result = invoke("init", argument, "--method", "vera", "-q")
    assert result.stdout == f"{name}\n"
    files = {f"{name}/{file}" for file in ("adapter_config.json", WEIGHTS, "surgery.json")}
    assert set(contents(here)) - before == {name, *files}


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
def test_target(targets: list[str], roles: set[str], texted_llama: Path, tmp_path: Path) -> None:
    assert adapted(init(texted_llama, "vera", tmp_path / "out", "--json", *flags(target=targets))) == roles
    assert set(adapter_config(tmp_path / "out")["target_modules"]) == roles
