"""TRL's own trainers on an adapter that was opened from a file, for each of our types.

`make trainers` installs TRL and sets SURGERY_TRAINERS; without it these tests are skipped. What TRL does to an adapter
is tested without it in tests/peft_types/test_torch_modes.py.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers as tf

import surgery
from surgery.methods.registry import own_infos
from tests.helpers.models import load_base, save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

if not os.environ.get("SURGERY_TRAINERS"):
    pytest.skip("make trainers installs TRL and sets SURGERY_TRAINERS", allow_module_level=True)
trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = [info.name for info in own_infos()]
TEXTS = [row["text"] for row in text_rows(24, shortest=4, longest=8)]
PAIRS = {"prompt": TEXTS[:8], "chosen": TEXTS[8:16], "rejected": TEXTS[16:]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save_model("llama", tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module", params=METHODS)
def opened(request, base: Path, tmp_path_factory: pytest.TempPathFactory):
    """Function that opens a trained adapter of each method, for training, on a new base."""
    folder = tmp_path_factory.mktemp(request.param)
    data = write_rows(folder / "t.jsonl", [{"text": text} for text in TEXTS])
    options = {"data": data, "samples": 4, "max_length": 8} if request.param == "giva" else {}
    surgery.init(base, request.param, folder / "start", **options)
    live = surgery.trainable(folder / "start", base)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in live.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    live.save_pretrained(folder / "trained")

    def again() -> Any:
        return peft.PeftModel.from_pretrained(load_base(base), folder / "trained", is_trainable=True)

    return again


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1,
        "learning_rate": 1e-2, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, **changes,
    }  # fmt: skip


def of(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """The trained tensors of an adapter."""
    tensors = peft.get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def check_reference(trainer: Any, loaded: dict[str, torch.Tensor]) -> None:
    """The reference is a copy of what was loaded, before and after training, and training moves the adapter."""
    model = trainer.model
    assert set(model.peft_config) == {"default", "ref"}
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in of(model, "ref").items())
    trainer.train()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in of(model, "ref").items())
    assert any(not torch.equal(tensor, loaded[name]) for name, tensor in of(model, "default").items())


def test_dpo_starts_at_ln_2(opened, base: Path, tmp_path: Path) -> None:
    live = opened()
    loaded = of(live, "default")
    trainer = trl.DPOTrainer(
        model=live,
        args=trl.DPOConfig(**settings(tmp_path)),
        train_dataset=datasets.Dataset.from_dict(PAIRS),
        processing_class=tf.AutoTokenizer.from_pretrained(base),
    )
    check_reference(trainer, loaded)
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] != pytest.approx(math.log(2), abs=1e-4)


def test_kto_starts_at_a_half(opened, base: Path, tmp_path: Path) -> None:
    """sigmoid(0), where model and reference agree."""
    live = opened()
    loaded = of(live, "default")
    rows = {"prompt": TEXTS[:8], "completion": TEXTS[8:16], "label": [True, False] * 4}
    trainer = trl.KTOTrainer(
        model=live,
        args=trl.KTOConfig(**settings(tmp_path)),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tf.AutoTokenizer.from_pretrained(base),
    )
    check_reference(trainer, loaded)
    assert logged(trainer, "loss")[0] == pytest.approx(0.5, abs=1e-4)


def test_grpo_starts_without_divergence(opened, base: Path, tmp_path: Path) -> None:
    live = opened()
    loaded = of(live, "default")
    trainer = trl.GRPOTrainer(
        model=live,
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        args=trl.GRPOConfig(**settings(tmp_path, beta=0.1, num_generations=4, max_completion_length=6)),
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS[:8]}),
        processing_class=tf.AutoTokenizer.from_pretrained(base, padding_side="left"),
    )
    check_reference(trainer, loaded)
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)


def test_sft_goes_on_from_what_was_loaded(opened, base: Path, tmp_path: Path) -> None:
    live = opened()
    loaded = of(live, "default")
    tokenizer = tf.AutoTokenizer.from_pretrained(base)
    rows = {"text": TEXTS[:4]}
    trainer = trl.SFTTrainer(
        model=live,
        args=trl.SFTConfig(**settings(tmp_path, max_steps=8)),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = opened().eval()(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(float(expected), rel=1e-3)
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "out"))
    again = surgery.Adapter.open(tmp_path / "out")
    moved = [name for name, tensor in again.tensors.items() if not torch.equal(tensor, loaded[name].to(tensor.dtype))]
    assert moved and len(moved) < len(again.tensors)
