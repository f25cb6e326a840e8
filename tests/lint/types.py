"""The control of the type checker: calls of methods that do not exist must fail, on both sides of surgery.converters.

mypy is run with one module replaced in memory by itself and a planted call. Should one of these runs pass, mypy does
not see across the packages, and its silence about the true sources would mean nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["PLANTED", "problems"]

# A module -> what is added to it, and the error that must come of it.
PLANTED: dict[str, tuple[str, str]] = {
    "surgery/cli/convert.py": (
        "from surgery.converters.report import ConvertReport as _Planted\n_Planted.no_such_method()\n",
        '"type[ConvertReport]" has no attribute "no_such_method"',
    ),
    "surgery/converters/report.py": (
        "from surgery.adapters.adapter import Adapter as _Planted\n_Planted.no_such_method()\n",
        '"type[Adapter]" has no attribute "no_such_method"',
    ),
}
# A user's script under mypy --strict, which must pass as it is: every verb, with the words of its keywords.
USER = """
from pathlib import Path

import torch

import surgery

budget = surgery.Budget(size="64KiB")
data = surgery.DataSettings("texts.jsonl", samples=64)
adapter = surgery.Adapter.from_pretrained("lora")
adapter.save_pretrained(Path("copy"), overwrite=True)
start, started = surgery.init("model", "frod", target_modules=["q_proj"], lora_alpha=8, dtype=torch.bfloat16)
made, converted = surgery.convert(adapter, to="giva", size="64KiB", bits=4, device=torch.device("cpu"))
again, repeated = surgery.convert("lora", "lora", budget=budget, base="model", data=data, dtype="bf16")
batch = surgery.convert(["a", Path("b")], "giva", base=["one", "other"], jobs=2)
settings = surgery.TrainSettings(max_steps=10, learning_rate=1e-3)
trained, training = surgery.train(made, "model", data, settings=settings, device="cuda:1")
tuned, tuning = surgery.train("lora", "model", "x.jsonl", max_steps=5, warmup_ratio=0.1, lr_scheduler_type="cosine")
merged = surgery.merge(adapter, "model", "out", dtype=torch.float16, overwrite=True)
blended, blending = surgery.blend([("a", 0.5), adapter], "out", how="ties", rank=8, overwrite=True)
exported = surgery.export(adapter, to="vllm", out="out", dtype="bfloat16")
comparison = surgery.compare(adapter, made, base="model", data=data)
inspection = surgery.inspect("lora")
pushed = surgery.push("folder", "org/name", dry_run=True)
peft_model = surgery.load("lora", "model", dtype=torch.bfloat16)
free = surgery.trainable(adapter, "model", device="auto")
low_rank = surgery.LowRank(torch.ones(2, 1), torch.ones(1, 2))
delta: surgery.Delta = surgery.Sum([(0.5, adapter.delta("q_proj")), (1.0, low_rank)])
configs = [surgery.GivaConfig(r=4), surgery.IniloraConfig(), surgery.FrodPortableConfig(), surgery.SmoaConfig()]
coded = surgery.codec.encode_layer(torch.ones(2, 1), torch.ones(1, 2), error=0.1)
base = surgery.BaseModel.open("model")
"""
# An expression of the script -> the type that mypy must find for it.
USER_TYPES = {
    "adapter": "surgery.adapters.adapter.Adapter",
    "start": "surgery.adapters.adapter.Adapter",
    "started": "surgery.initialization.report.Report",
    "made": "surgery.adapters.adapter.Adapter",
    "again": "surgery.adapters.adapter.Adapter",
    "converted": "surgery.converters.report.ConvertReport",
    "batch": "surgery.converters.report.BatchReport",
    "batch.entries[0].report": "surgery.converters.report.ConvertReport | None",
    "trained": "surgery.adapters.adapter.Adapter",
    "tuned": "surgery.adapters.adapter.Adapter",
    "training": "surgery.training.report.TrainReport",
    "merged": "surgery.merging.report.MergeReport",
    "exported": "surgery.exporting.report.ExportReport",
    "blending": "surgery.blending.report.BlendReport",
    "comparison": "surgery.comparison.report.Comparison",
    "inspection": "surgery.inspection.report.Inspection",
    "pushed": "surgery.publishing.report.PushReport",
    "peft_model": "peft.peft_model.PeftModel",
    "free": "peft.peft_model.PeftModel",
    "delta": "surgery.deltas.operators.Delta",
    "coded.factors()": "tuple[torch._tensor.Tensor, torch._tensor.Tensor]",
    "base": "surgery.models.base_model.BaseModel",
}
# Lines that must not pass -> the error that mypy must report.
USER_ERRORS = {
    "converted.no_such_method()": '"ConvertReport" has no attribute "no_such_method"',
    "made.no_such_method()": '"Adapter" has no attribute "no_such_method"',
    'surgery.convert("lora", "giva", bits=5)': "No overload variant",
    'surgery.train("lora", "model", "x.jsonl", dtype="float65")': "incompatible type \"Literal['float65']\"",
    'surgery.load("lora", task="poetry")': "incompatible type \"Literal['poetry']\"",
}


def problems(root: Path) -> list[str]:
    """Return a line for each planted call that the type checker did not find."""
    found = []
    for module, (lines, expected) in PLANTED.items():
        with tempfile.TemporaryDirectory() as folder:
            planted = Path(folder) / "planted.py"
            planted.write_text((root / module).read_text(encoding="utf-8") + lines, encoding="utf-8")
            output = _mypy(root, "--shadow-file", module, str(planted))
        if expected not in output:
            found.append(f"{module}: mypy does not see a planted call of a method that does not exist")
    return found + _of_users()


def _of_users() -> list[str]:
    """Return a line for each thing that a user's mypy says of the calls, and should not, or does not, and should."""
    lines = USER.splitlines()
    first = len(lines) + 1  # of the lines that make mypy speak
    asked = [f"reveal_type({expression})" for expression in USER_TYPES]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "user.py"
        script.write_text("\n".join([*lines, *asked, *USER_ERRORS]) + "\n", encoding="utf-8")
        output = _mypy(Path(folder), "--strict", "--config-file=", "--no-pretty", str(script))
    said: dict[int, str] = {}
    for line in output.splitlines():
        if line.startswith(("user.py:", str(script))):
            number = int(line.partition(".py:")[2].partition(":")[0])
            said[number] = f"{said.get(number, '')}{line.partition('.py:')[2]}\n"
    found = [f"a user's script: {said[number].strip()}" for number in sorted(said) if number < first]
    wanted = {f"reveal_type({name})": f'Revealed type is "{kind}"' for name, kind in USER_TYPES.items()} | USER_ERRORS
    for number, (line, expected) in enumerate(wanted.items(), first):
        if expected not in said.get(number, ""):
            answer = said.get(number, "nothing").strip()
            found.append(f"a user's script: of {line} mypy says {answer}, not {expected}")
    return found


def _mypy(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout
