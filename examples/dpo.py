"""Preferences with TRL's `DPOTrainer`, on an adapter that was opened from a file.

    pip install trl
    python examples/dpo.py [--out FOLDER]

Nothing is downloaded: the base is the small model of letters of `trl_sft.py`. An adapter is started and saved, opened
again, and trained to prefer how a text goes on to the same letters backwards. TRL takes a copy of the opened adapter as
its reference, so that the first loss is ln 2.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import transformers
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl_sft import small_model, texts

import surgery

PROMPT = 24


def preferences(prose: list[str]) -> dict[str, list[str]]:
    """Each text's beginning, with its end as chosen, and its end backwards as rejected."""
    long = [text for text in prose if len(text) > 2 * PROMPT][:400]
    return {
        "prompt": [text[:PROMPT] for text in long],
        "chosen": [text[PROMPT:] for text in long],
        "rejected": [text[: PROMPT - 1 : -1] for text in long],
    }


def main() -> None:
    """Make the base, start the adapter, open it, train it with TRL, open what TRL saved."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("dpo-out"), help="where models go")
    parser.add_argument("--method", default="inilora", help="any of `surgery methods` that starts without data")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base, start, out = (arguments.out / name for name in ("base", "start", "trained"))
    prose, _ = texts()
    small_model(base, prose)
    surgery.init(base, arguments.method, start, rank=16, overwrite=True)

    trainer = DPOTrainer(
        model=surgery.trainable(start, base),
        args=DPOConfig(
            output_dir=str(arguments.out / "checkpoints"), max_steps=arguments.steps, learning_rate=5e-4, use_cpu=True,
            per_device_train_batch_size=8, logging_steps=1, report_to="none", save_strategy="no", bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(preferences(prose)),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"first loss {losses[0]:.4f} (ln 2 = {math.log(2):.4f}), mean of the last ten {sum(losses[-10:]) / 10:.4f}")
    trainer.model.save_pretrained(out, selected_adapters=["default"])  # without the reference, which nobody needs now
    print(f"{out}: {surgery.Adapter.open(out).peft_type}")


if __name__ == "__main__":
    main()
