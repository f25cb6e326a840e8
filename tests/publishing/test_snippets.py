"""What a card says to type works: for every type of adapter, in a fresh process, from the Hub and from the cache."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import surgery
from tests.helpers.hub import KINDS, make_adapter
from tests.helpers.loopback import OWNER, Hub
from tests.helpers.models import load_base, model_inputs, output

# Runs each card's Python, in a namespace of its own, and its commands; prints the outputs of what was loaded.
RUN = r"""
import io, json, re, sys, contextlib
from pathlib import Path
import torch

cards, with_commands = json.loads(sys.argv[1]), sys.argv[2] == "yes"
ids = torch.tensor(json.loads(sys.argv[3]))
found = {}


def answers(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.tolist()


for name, card in cards.items():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block, names)
    found[name] = answers(names["model"])
    if with_commands:
        import peft
        from click.testing import CliRunner

        from surgery.cli.main import cli

        for line in re.findall(r"^\$ surgery (.+)$", card, re.MULTILINE):
            result = CliRunner().invoke(cli, line.split(), catch_exceptions=False)
            assert result.exit_code == 0, result.output
            base = names["model"].unload()
            assert json.loads(Path(line.split()[-1], "adapter_config.json").read_text())["peft_type"] == "LORA"
            found[f"{name} as lora"] = answers(peft.PeftModel.from_pretrained(base, line.split()[-1]))
print(json.dumps(found))
"""


def test_the_snippet_of_every_type_works(hub: Hub, llama: Path, tmp_path: Path, fresh) -> None:
    """Logits from the Hub are those of the folder; then the same without a Hub, offline, from the cache."""
    hub.publish("bases/llama", llama)
    ids = model_inputs("llama")["input_ids"]
    cards, expected = {}, {}
    for method in ("lora", *KINDS):
        folder = make_adapter(method, llama, tmp_path / method)
        (folder / "plot.png").write_bytes(b"picture")
        cards[method] = surgery.push(folder, f"org/{method}", base_model="bases/llama").card
        with torch.no_grad():
            expected[method] = output(surgery.load(folder, load_base(llama)).eval(), model_inputs("llama"))
    with torch.no_grad():
        base = output(load_base(llama), model_inputs("llama"))
    blocks = {name: re.findall(r"```python\n(.*?)```", card, re.DOTALL) for name, card in cards.items()}
    assert all(len(found) == 1 for found in blocks.values())
    assert {name for name, found in blocks.items() if "import surgery" in found[0]} == set(KINDS) - {"vera"}
    assert {name for name, card in cards.items() if "--to lora" in card} == set(KINDS)

    script = tmp_path / "run.py"
    script.write_text(RUN)
    arguments = (str(script), json.dumps(cards), "yes", json.dumps(ids.tolist()))
    first = fresh(*arguments, HF_TOKEN=OWNER)
    assert first.returncode == 0, first.stderr
    found = {name: torch.tensor(value) for name, value in json.loads(first.stdout.splitlines()[-1]).items()}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert not torch.allclose(value, base, atol=1e-3), name  # or equality would say nothing
        if name != "lora":
            change = float((value - base).norm())
            assert float((found[f"{name} as lora"] - value).norm()) < 0.3 * change, name

    hub.requests.clear()
    gone = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    offline = fresh(str(script), json.dumps(cards), "no", json.dumps(ids.tolist()), **gone)
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout.splitlines()[-1]) == {name: found[name].tolist() for name in cards}
    assert hub.requests == []


def test_a_head_gets_its_number_of_labels(hub: Hub, llama: Path, tmp_path: Path, monkeypatch) -> None:
    """The snippet for a classifier whose base has no head; executed here."""
    hub.publish("bases/llama", llama)
    folder = tmp_path / "classes"
    surgery.init(llama, "vera", folder, rank=4, task="seq-cls")
    opened = surgery.Adapter.open(folder)
    head = next(name for name in opened.tensors if name.endswith("score.weight"))
    opened.tensors[head] = torch.randn(5, opened.tensors[head].shape[1])
    opened.save(folder, force=True)
    (folder / "plot.png").write_bytes(b"picture")
    card = surgery.push(folder, "org/classes", base_model="bases/llama@main").card
    assert "num_labels=5" in card and "pipeline_tag: text-classification" in card and 'revision="main"' in card
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], names)
    model = names["model"]
    assert torch.equal(model.base_model.model.score.modules_to_save["default"].weight, opened.tensors[head])
    with pytest.raises(RuntimeError, match="size mismatch"):
        exec(re.findall(r"```python\n(.*?)```", card.replace("num_labels=5, ", ""), re.DOTALL)[0], {})


def test_the_command_in_a_process_of_its_own(hub: Hub, llama: Path, tmp_path: Path, fresh) -> None:
    """With a login on the disk, nothing of a machine's paths, and the library's answer."""
    folder = make_adapter("giva", llama, tmp_path / "made")
    shutil.copy(__file__, folder / "notes.py")
    (tmp_path / "hf-home").mkdir()
    (tmp_path / "hf-home" / "token").write_text(OWNER)
    code = "from surgery.cli import main; main()"
    result = fresh("-c", code, "push", "made", "org/made", "--base-model", "bases/llama", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report["out"] == f"{hub.url}/org/made" and report["left_out"] == ["notes.py"]
    assert set(hub.files("org/made")) == {file["path"] for file in report["files"]}
    assert "layers.png" in hub.files("org/made")
