"""What must not leave the machine does not: no token in any output, no path and no token in any published file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import HubError
from surgery.publishing.private import without_paths
from tests.helpers.command_line import invoke
from tests.helpers.hub import make_adapter
from tests.helpers.loopback import OWNER, Hub
from tests.helpers.secrets import OTHER_TOKEN

WEIGHTS = "adapter_model.safetensors"
REPO, BASE = "org/small", "bases/llama"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ada/models/llama", "llama"),
        ("/home/ada/my models/llama", "llama"),
        ("file:///data/models/llama", "llama"),
        ("~/models/llama", "llama"),
        ("C:\\Users\\ada\\llama", "llama"),
        ("the labels of /data/x/train.jsonl are short", "the labels of train.jsonl are short"),
        ("from '/data/x/train.jsonl'", "from 'train.jsonl'"),
        (["/a/b/c", {"x": "/a/b/c"}], ["c", {"x": "c"}]),
        ("org/name", "org/name"),
        ("https://host/a/b", "https://host/a/b"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"model\.layers\.(0|1)/x", r"model\.layers\.(0|1)/x"),
        ("W / |dW| and/or </b>", "W / |dW| and/or </b>"),
        ("relative/path/here", "relative/path/here"),
        (3.5, 3.5),
        (None, None),
    ],
)
def test_absolute_paths_are_cut(value, expected) -> None:
    assert without_paths(value) == expected


@pytest.fixture
def leaky(llama: Path, tmp_path: Path) -> Path:
    """An adapter folder as a training run leaves it: paths in every file, and files that nobody should get."""
    folder = make_adapter("lora", llama, tmp_path / "home" / "secret-project" / "small")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama)
    config["corda_config"] = {"cache_file": f"{folder}/cache.pt"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    history = {"command": "convert", "data": f"{folder}/train.jsonl", "notes": [f"read {folder}/train.jsonl twice"]}
    (folder / "surgery.json").write_text(json.dumps(history))
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(llama), "eos_token": "</s>"}))
    (folder / "plot.png").write_bytes(b"picture")
    for name in ("training_args.bin", "trainer_state.json", ".env", "events.out.tfevents", "optimizer.pt"):
        (folder / name).write_text(f"{folder} {OTHER_TOKEN}")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / WEIGHTS).write_bytes(b"")
    return folder


def test_nothing_private_is_published(hub: Hub, leaky: Path, llama: Path, tmp_path: Path) -> None:
    report = surgery.push(leaky, REPO, base_model=BASE)
    published = hub.files(REPO)
    assert set(published) == {
        "README.md", "adapter_config.json", WEIGHTS, "plot.png", "surgery.json", "tokenizer_config.json"
    }  # fmt: skip
    everything = b"\n".join(published.values()) + json.dumps(report.to_dict()).encode()
    secrets = (str(tmp_path), str(llama), str(Path.home()) + "/", "secret-project", OWNER, OTHER_TOKEN)
    assert not any(secret.encode() in everything for secret in secrets)
    config = json.loads(published["adapter_config.json"])
    assert config["base_model_name_or_path"] == BASE and config["corda_config"] == {"cache_file": "cache.pt"}
    assert json.loads(published["surgery.json"])["notes"] == ["read train.jsonl twice"]
    assert json.loads(published["tokenizer_config.json"]) == {"name_or_path": "model", "eos_token": "</s>"}
    assert {"training_args.bin", ".env", "checkpoint-10", "optimizer.pt"} <= set(report.left_out)
    # The control: the folder has them.
    held = b"\n".join(path.read_bytes() for path in leaky.iterdir() if path.is_file())
    assert str(tmp_path).encode() in held and OTHER_TOKEN.encode() in held


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("README.md", f"use {OTHER_TOKEN}", "README.md, line 3: holds what looks like a Hub token"),
        ("README.md", "lies in {folder}/x", "README.md, line 3: holds a path of a machine"),
        ("README.md", "lies in /home/ada/models", r"line 3: holds a path of a machine \(/home/ada/\)"),
        ("README.md", "lies in /Users/ada/models", "holds a path of a machine"),
        ("README.md", "lies in C:\\Users\\ada", "holds a path of a machine"),
        ("surgery.json", f'{{"token": "{OTHER_TOKEN}"}}', "surgery.json, line 1: holds what looks like a Hub token"),
        ("LICENSE", f"by {OTHER_TOKEN}", "LICENSE, line 1"),
        ("chat_template.jinja", "{folder}", "chat_template.jinja, line 1"),
    ],
)
def test_a_text_with_a_secret_is_refused(name: str, line: str, words: str, hub: Hub, llama, tmp_path: Path) -> None:
    folder = make_adapter("lora", llama, tmp_path / "small")
    text = line.replace("{folder}", str(folder))
    (folder / name).write_text(f"# Mine\n\n{text}\n" if name == "README.md" else text)
    (folder / "plot.png").write_bytes(b"picture")
    with pytest.raises(HubError, match=words) as error:
        surgery.push(folder, REPO, base_model=BASE)
    assert OTHER_TOKEN not in str(error.value) and hub.requests == []


def test_harmless_text_is_not_refused(hub: Hub, llama: Path, tmp_path: Path) -> None:
    folder = make_adapter("lora", llama, tmp_path / "small")
    text = "Set HF_TOKEN (hf_...), run /usr/bin/env python, see https://host/home/ada/x and data/home/x/y.\n"
    (folder / "README.md").write_text(text)
    assert text in surgery.push(folder, REPO, base_model=BASE, dry_run=True).card


def test_metadata_of_the_weights_is_looked_at(llama: Path, tmp_path: Path) -> None:
    folder = make_adapter("lora", llama, tmp_path / "small")
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt", "made_in": str(folder)})
    with pytest.raises(HubError, match=r"its metadata.*holds a path of a machine"):
        surgery.push(folder, REPO, base_model=BASE, dry_run=True)


FAULTS = [
    lambda hub: None,
    lambda hub: hub.answer("GET /api/whoami", 401),
    lambda hub: hub.answer("PUT /store/", 500, times=99),
    lambda hub: hub.drop("PUT /store/", after=9, times=99),
    lambda hub: hub.answer("POST .*/commit/", 403),
    lambda hub: hub.answer("POST .*/batch", 400),
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("flags", [[], ["-v"], ["--json"]])
def test_no_output_holds_a_token_or_a_signature(fault, flags, hub: Hub, lora: Path, waits, caplog) -> None:
    """Not of the command, not of the client's logs, whatever goes wrong."""
    (lora / "plot.png").write_bytes(b"picture")
    fault(hub)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        if "-v" in flags:
            root.setLevel(logging.INFO)
        result = invoke("push", lora, REPO, "--base-model", BASE, "--token", OWNER, *flags)
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
    said = result.stdout + result.stderr + caplog.text
    assert OWNER not in said and "Signature" not in said
    assert result.exit_code == (0 if fault is FAULTS[0] else 1)
    assert f"Bearer {OWNER}" in hub.tokens_seen
    if "-v" in flags:
        assert "HTTP Request" in caplog.text  # or there would be nothing to redact


@pytest.mark.parametrize(
    "arguments",
    [
        ("push", "small", REPO, OTHER_TOKEN),
        ("push", "small", OTHER_TOKEN),
        ("push", OTHER_TOKEN, REPO),
        ("push", "small", f"https://ada:{OTHER_TOKEN}@host/org/small"),
        ("inspect", OTHER_TOKEN),
        ("inspect", f"https://ada:{OTHER_TOKEN}@host/org/small"),
    ],
)
def test_a_token_in_the_wrong_place_is_not_repeated(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code in {1, 2} and "Error: " in result.stderr
    assert OTHER_TOKEN not in result.stdout + result.stderr


def test_a_token_from_standard_input(hub: Hub, lora: Path, monkeypatch) -> None:
    from click.testing import CliRunner

    from surgery.cli.main import cli

    monkeypatch.delenv("HF_TOKEN")
    (lora / "plot.png").write_bytes(b"picture")
    arguments = ["push", str(lora), REPO, "--base-model", BASE, "--token", "-", "-q"]
    result = CliRunner().invoke(cli, arguments, input=f"{OWNER}\n", catch_exceptions=False)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{hub.url}/{REPO}\n", "")
    assert hub.tokens_seen == {f"Bearer {OWNER}"}
