"""Shrink every LoRA of a folder; what is done is not done again.

    python examples/compress_folder.py [LORAS] [--base MODEL] [--data FILE] [--out FOLDER]

Without LORAS three are made: one that was trained for longer than the others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import transformers
from sample import sample, train_lora

import surgery


def three_loras(folder: Path, data: Path) -> Path:
    """Adapters of three tenants."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for place, (name, steps, rank) in enumerate((("ada", 24, 8), ("ben", 12, 8), ("cleo", 12, 16))):
        if not (folder / name).exists():
            train_lora(data / "model", rows[600 * place :], folder / name, steps, rank)
    return folder


def main() -> None:
    """Go through the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("loras", type=Path, nargs="?", help="a folder of adapter folders")
    parser.add_argument("--out", type=Path, default=Path("compressed"), help="where the small ones go")
    parser.add_argument("--sample", type=Path, default=Path("sample"), help="from examples/sample.py")
    parser.add_argument("--base", type=Path, help="their base model")
    parser.add_argument("--data", type=Path, help="texts of the kind that they see; no labels")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.loras is None:
        data = sample(arguments.sample)
        arguments.loras = three_loras(arguments.out / "loras", data)
        arguments.base, arguments.data = data / "model", data / "texts.jsonl"
    options = {"base": arguments.base, "data": arguments.data, "samples": 128, "max_length": 48}
    batch = surgery.convert([arguments.loras], to="giva", out=arguments.out, ratio=20, **options)
    for entry in batch.entries:
        print(entry.adapter, entry.state, entry.error or f"{entry.report.bytes} bytes, keeps {entry.report.kept:.1%}")


if __name__ == "__main__":
    main()
