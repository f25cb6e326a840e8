"""The merged folder: its files, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as tf
from safetensors.torch import load_file

import surgery
from surgery.errors import OutputError
from surgery.merging import folder as merged_folder
from tests.helpers.command_line import contents
from tests.helpers.merges import trained
from tests.helpers.models import (
    load_base,
)


class TestFolder:
    """The output appears whole or not at all, and holds what belongs to the result."""

    @pytest.fixture
    def base(self, llama: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(llama, folder)
        for name in ("tokenizer.json", "chat_template.jinja", "1_Pooling/config.json", "pytorch_model.bin", "m.gguf"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        (folder / ".git").mkdir()
        (folder / ".git" / "config").write_text("")
        return folder

    @pytest.fixture
    def adapter(self, llama: Path, tmp_path: Path) -> Path:
        return trained(load_base(llama), peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "lora")

    def test_other_files_are_copied_but_for_other_weights(self, adapter, base, tmp_path: Path) -> None:
        report = surgery.merge(adapter, base, tmp_path / "merged")
        found = contents(tmp_path / "merged")
        assert {"tokenizer.json", "chat_template.jinja", "1_Pooling/config.json", "generation_config.json"} < set(found)
        assert report.left_out == ["m.gguf", "pytorch_model.bin"] and not set(report.left_out) & set(found)
        assert not any(name.startswith(".git") for name in found)
        history = json.loads((tmp_path / "merged" / "surgery.json").read_text())
        assert history["command"] == "merge" and history["base"] == "base" and str(tmp_path) not in json.dumps(history)

    def test_dry_run_says_the_size_and_writes_nothing(self, adapter, base, tmp_path: Path) -> None:
        before = contents(tmp_path)
        planned = surgery.merge(adapter, base, tmp_path / "merged", dry_run=True)
        assert contents(tmp_path) == before and planned.out is None and planned.dry_run
        written = surgery.merge(adapter, base, tmp_path / "merged")
        assert planned.parameters == written.parameters and 0 < written.bytes - planned.bytes < 1e4  # the header

    def test_existing_output_needs_force(self, adapter, base, tmp_path: Path) -> None:
        surgery.merge(adapter, base, tmp_path / "merged")
        with pytest.raises(OutputError, match="--force"):
            surgery.merge(adapter, base, tmp_path / "merged")
        surgery.merge(adapter, base, tmp_path / "merged", force=True, dtype="bfloat16")
        assert set(surgery.inspect(tmp_path / "merged").dtypes) == {"bfloat16"}

    @pytest.mark.parametrize("where", ["base", "lora", ".", "base/inside"])
    def test_inputs_are_never_replaced(self, where: str, adapter, base, tmp_path: Path) -> None:
        before = contents(tmp_path)
        with pytest.raises(OutputError, match="choose another output"):
            surgery.merge(adapter, base, tmp_path / where, force=True)
        assert contents(tmp_path) == before

    def test_a_corrupted_write_is_caught(self, adapter, base, tmp_path: Path, monkeypatch) -> None:
        original = merged_folder.write_file

        def corrupting(path: Path, *arguments: Any) -> Any:
            digests = original(path, *arguments)
            with path.open("r+b") as file:
                file.seek(-3, 2)
                file.write(b"\x55")
            return digests

        monkeypatch.setattr(merged_folder, "write_file", corrupting)
        before = contents(tmp_path)
        with pytest.raises(OutputError, match="read back differs"):
            surgery.merge(adapter, base, tmp_path / "merged")
        assert contents(tmp_path) == before

    def test_an_interruption_leaves_nothing(self, adapter, base, tmp_path: Path) -> None:
        def interrupt(done: int, total: int, what: str) -> None:
            if done == 3:
                raise KeyboardInterrupt

        before = contents(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            surgery.merge(adapter, base, tmp_path / "merged", progress=interrupt)
        assert contents(tmp_path) == before

    def test_a_full_disk_is_seen_before_any_work(self, adapter, base, tmp_path: Path, monkeypatch) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(merged_folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OutputError, match="1000 B left"):
            surgery.merge(adapter, base, tmp_path / "merged")

    def test_progress_names_the_files(self, adapter, base, tmp_path: Path) -> None:
        seen: list[tuple[int, int, str]] = []
        surgery.merge(adapter, base, tmp_path / "merged", progress=lambda *step: seen.append(step))
        assert [done for done, _, _ in seen] == list(range(1, seen[0][1] + 1)) and seen[0][2] == "model.safetensors"

    def test_tied_and_fresh_tensors_go_into_the_last_shard(self, model_folder, tmp_path: Path) -> None:
        base = model_folder("llama-bf16-sharded")
        model = tf.LlamaForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
        adapter = trained(model, config, tmp_path / "lora")
        report = surgery.merge(adapter, base, tmp_path / "merged")
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
        assert report.added == ["score.weight"] and index["weight_map"]["score.weight"] == report.files[-1]
        sizes = [t.nbytes for file in report.files for t in load_file(tmp_path / "merged" / file).values()]
        assert index["metadata"]["total_size"] == sum(sizes)
        opened = tf.LlamaForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert opened.config.num_labels == 3
