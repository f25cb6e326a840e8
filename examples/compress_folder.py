"""Shrink every LoRA of a folder: each as far as its answers stay the original's, and what is done is not done again.

    python examples/compress_folder.py [LORAS] [--base MODEL] [--data FILE] [--agreement 0.97] [--out FOLDER]

Without LORAS three are made: one that was trained for longer than the others. For each the smallest of several sizes is
kept whose answers agree with the original's on the share asked for, measured on held-out texts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import transformers
from sample import sample, train_lora

import surgery
from surgery.display.tables import table
from surgery.system.text import human_bytes

RATIOS = (80, 40, 20, 10)


def three_loras(folder: Path, data: Path) -> Path:
    """Adapters of three tenants."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for place, (name, steps, rank) in enumerate((("ada", 24, 8), ("ben", 12, 8), ("cleo", 12, 16))):
        if not (folder / name).exists():
            train_lora(data / "model", rows[600 * place :], folder / name, steps, rank)
    return folder


def shrunk(lora: Path, out: Path, wanted: float, **calibration: str | int | Path) -> list[str]:
    """Write the smallest form that agrees as often as is wanted; a row of the table."""
    original = surgery.Adapter.open(lora)
    before = (lora / "adapter_model.safetensors").stat().st_size
    for ratio in RATIOS:
        try:
            small, report = surgery.convert(original, "giva", ratio=ratio, **calibration)
        except surgery.errors.MethodError as error:  # too small for what must be carried
            print(f"{lora.name}: {error}")
            continue
        if report.agreement is not None and report.agreement >= wanted:
            small.save(out)
            return [lora.name, human_bytes(before), human_bytes(report.bytes), f"{report.ratio:.0f} x",
                    f"{report.agreement:.1%}", f"{report.kl:.5f}"]  # fmt: skip
    return [lora.name, human_bytes(before), "left as it is", "-", "-", "-"]


def main() -> None:
    """Go through the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("loras", type=Path, nargs="?", help="a folder of adapter folders")
    parser.add_argument("--out", type=Path, default=Path("compressed"), help="where the small ones go")
    parser.add_argument("--sample", type=Path, default=Path("sample"), help="from examples/sample.py")
    parser.add_argument("--base", type=Path, help="their base model")
    parser.add_argument("--data", type=Path, help="texts of the kind that they see; no labels")
    parser.add_argument("--agreement", type=float, default=0.97, help="share of answers that must be the original's")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.loras is None:
        data = sample(arguments.sample)
        arguments.loras = three_loras(arguments.out / "loras", data)
        arguments.base, arguments.data = data / "model", data / "texts.jsonl"
    elif arguments.base is None or arguments.data is None:
        parser.error("LORAS needs --base and --data")
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Gathered for the first adapter, read for all others.
    calibration = {"base": arguments.base, "data": arguments.data, "samples": 128, "max_length": 48,
                   "stats": arguments.out / "base.stats"}  # fmt: skip
    rows = []
    for lora in sorted(path.parent for path in arguments.loras.glob("*/adapter_config.json")):
        small = arguments.out / lora.name
        if small.exists():
            print(f"{lora.name}: done before")
        else:
            rows.append(shrunk(lora, small, arguments.agreement, **calibration))
    print(table(["adapter", "before", "after", "smaller", "agreement", "KL"], rows, right=(1, 2, 3, 4, 5)))


if __name__ == "__main__":
    main()
