"""Any adapter as a plain LoRA that a server loads: one rank for all layers, bfloat16, checked with stock PEFT alone.

    python examples/for_a_server.py [ADAPTER --base MODEL] [--rank 16] [--out FOLDER]

Without ADAPTER a packed GiVA is made from the sample's LoRA and exported. Servers such as vLLM read `r` and
`lora_alpha` from the configuration; where layers have different ranks, the largest is what they must be told to allow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from sample import sample

import surgery

# Run without `surgery`, as a server would be: PEFT opens the LoRA and answers.
STOCK = """
import sys, torch, transformers
from peft import PeftModel
base, adapter, out = sys.argv[1:]
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
model = PeftModel.from_pretrained(model, adapter).eval()
assert "surgery" not in sys.modules
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1000, 1128).reshape(8, 16)).logits, out)
"""


def main() -> None:
    """Export, and check with stock PEFT."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("adapter", type=Path, nargs="?", help="an adapter of any type")
    parser.add_argument("--base", type=Path, help="its base model")
    parser.add_argument("--rank", type=int, default=16, help="of every layer")
    parser.add_argument("--out", type=Path, default=Path("server-out"), help="where the LoRA goes")
    parser.add_argument("--sample", type=Path, default=Path("sample"), help="from examples/sample.py")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out, adapter, base = arguments.out, arguments.adapter, arguments.base
    out.mkdir(parents=True, exist_ok=True)
    if adapter is None:
        data = sample(arguments.sample)
        adapter, base = out / "packed", data / "model"
        surgery.convert(data / "lora", "giva", adapter, ratio=20, overwrite=True)
    elif base is None:
        parser.error("ADAPTER needs --base")
    _, report = surgery.convert(
        adapter, "lora", out / "lora", base=base, rank=arguments.rank, dtype="bfloat16", overwrite=True
    )
    config = json.loads((out / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    print(f"{report.source_type} of {report.source_bytes:,} bytes -> LORA of {report.bytes:,} bytes, "
          f"weight error {report.weight_error:.2%}")  # fmt: skip
    print(f"r {config['r']}, lora_alpha {config['lora_alpha']}, other ranks: {len(config['rank_pattern'])} layers")
    for note in report.notes:
        print(note)
    if arguments.adapter is not None:
        return
    subprocess.run([sys.executable, "-c", STOCK, base, out / "lora", out / "logits.pt"], check=True)
    served = torch.load(out / "logits.pt", weights_only=True)
    with torch.no_grad():
        own = surgery.load(adapter, base).eval()(input_ids=torch.arange(1000, 1128).reshape(8, 16)).logits
    print(f"stock PEFT's answers differ by {float((served - own).abs().max() / own.abs().max()):.1e} of the largest")


if __name__ == "__main__":
    main()
