"""A vision transformer on handwritten digits: a small ViT learns upright digits, an adapter teaches it turned ones.

    pip install scikit-learn
    python examples/vision.py [--method frod] [--out FOLDER]

The digits (1,797 images of 8 x 8) come with scikit-learn. The base model is trained here for some seconds with all of
its weights; then a fresh adapter starts on it, trains in a plain loop, and is merged back into a model of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from sklearn.datasets import load_digits

import surgery
from surgery.methods.registry import method_info, method_infos

CUT = 1500


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(n, 1, 8, 8)` with values from 0 to 1, and the digits that they show, in an order of chance."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.images / 16, dtype=torch.float32)[order, None], torch.tensor(found.target)[order]


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, lr: float) -> None:
    """Whatever requires a gradient learns, in batches of 64."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    model.train()
    for step in range(steps):
        part = torch.arange(64 * step, 64 * step + 64) % CUT
        model(pixel_values=images[part], labels=labels[part]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """On the images that were not trained on."""
    answers = model.eval()(pixel_values=images[CUT:]).logits.argmax(-1)
    return float((answers == labels[CUT:]).float().mean())


def main() -> None:
    """Train the base, start the adapter, train it, merge it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("vision-out"), help="where models go")
    parser.add_argument("--method", choices=[m.name for m in method_infos() if not m.reads_gradients], default="frod")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = arguments.out
    images, labels = digits()
    turned = images.rot90(1, (2, 3))

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0,
    )  # fmt: skip
    base = transformers.ViTForImageClassification(config)
    train(base, images, labels, 300, 1e-3)
    base.save_pretrained(out / "base")
    upright, sideways = accuracy(base, images, labels), accuracy(base, turned, labels)
    print(f"base: right on {upright:.1%} of upright digits, on {sideways:.1%} of turned ones")

    _, report = surgery.init(out / "base", arguments.method, out / "start", overwrite=True)
    model = surgery.trainable(out / "start", out / "base")
    print(f"{arguments.method}: {report.trainable_parameters:,} of {base.num_parameters():,} numbers train, "
          f"{accuracy(model, turned, labels):.1%} before")  # fmt: skip
    train(model, turned, labels, arguments.steps, method_info(arguments.method).training_rate)
    print(f"{arguments.method}: {accuracy(model, turned, labels):.1%} of turned digits after {arguments.steps} steps")
    model.save_pretrained(out / "trained")

    surgery.merge(out / "trained", out / "base", out / "merged", overwrite=True)
    merged = transformers.ViTForImageClassification.from_pretrained(out / "merged")
    print(f"merged, without PEFT: {accuracy(merged, turned, labels):.1%}")


if __name__ == "__main__":
    main()
