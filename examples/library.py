"""A notebook's work with `surgery`, cell by cell: start, inspect, convert, compare, plot.

    python examples/library.py [--out FOLDER] [--sample FOLDER]

Editors that know `# %%` run it cell by cell.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import transformers
from sample import sample

import surgery

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--out", type=Path, default=Path("library-out"), help="where adapters and pictures go")
parser.add_argument("--sample", type=Path, default=Path("sample"), help="from examples/sample.py")
arguments = parser.parse_args()
out, data = arguments.out, sample(arguments.sample)
out.mkdir(parents=True, exist_ok=True)
model, lora = data / "model", data / "lora"
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
matplotlib.use("agg")  # a notebook leaves this line out

# %% Start: an adapter whose bases are the loss's gradient on 32 samples.
adapter, report = surgery.init(model, "giva", out / "start", data=data / "train.jsonl", task="seq-cls", overwrite=True)
print(f"giva: {report.trainable_parameters:,} numbers train, loss {report.loss:.3f} before training")

# %% Inspect: where a trained LoRA's energy sits, and how many ranks hold it.
inspection = surgery.inspect(lora, out / "energy.png")
for role in inspection.roles:
    print(f"{role.role}: {role.layers} layers")
widest = max(inspection.sites, key=lambda site: site.rank_95 or 0)
print(f"{widest.module} needs rank {widest.rank_95} for 95 % of its energy")

# %% Convert: the same LoRA at several sizes, in memory, without data and with it. Statistics are gathered once.
original = surgery.Adapter.open(lora)
curves: dict[str, list[tuple[float, float]]] = {"without data": [], "with data": []}
# Few texts, and short ones, so that this takes a minute: for numbers to trust leave the last two out.
few = {"base": model, "samples": 128, "max_length": 48}
statistics = {**few, "data": data / "texts.jsonl", "stats": out / "model.stats"}
smallest = original
for ratio in (10, 20, 40):
    for name, options in (("without data", {}), ("with data", statistics)):
        small, converted = surgery.convert(original, "giva", ratio=ratio, **options)
        comparison = surgery.compare(original, small, data=data / "test.jsonl", latency=False, **few)
        curves[name].append((converted.bytes / 1024, comparison.kl))
        print(f"{ratio} x smaller {name}: KL {comparison.kl:.5f}, agreement {comparison.agreement:.1%}")
        smallest = small
smallest.save(out / "small", overwrite=True)

# %% Compare: layer by layer, as a picture.
comparison = surgery.compare(lora, out / "small", data=data / "test.jsonl", plot=out / "errors.png", **few)
if comparison.scores is not None:
    print(f"{comparison.scores.name}: {comparison.scores.a:.1%} before, {comparison.scores.b:.1%} after")

# %% Plot: what a size costs.
from matplotlib import pyplot  # noqa: E402

figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
for (name, points), colour, marker in zip(curves.items(), ("#d55e00", "#0072b2"), ("s", "o"), strict=True):
    axes.loglog(*zip(*points, strict=True), color=colour, marker=marker, label=name)
sizes = [round(size) for size, _ in curves["with data"]]
axes.set_xticks(sizes, sizes)
axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
axes.set_xlabel("size of the file (KiB)")
axes.set_ylabel("KL divergence from the original (nats)")
axes.legend(frameon=False)
axes.grid(alpha=0.25)
figure.savefig(out / "size-fidelity.png", dpi=150)
print(f"pictures: {', '.join(sorted(path.name for path in out.glob('*.png')))} in {out}/")
