"""Train an adapter with TRL's `SFTTrainer`, which does not know `surgery`.

    pip install trl
    python examples/trl_sft.py [--out FOLDER]

Nothing is downloaded: a small causal language model of letters is made here, learns English from docstrings of the
standard library with all of its weights, and is then taught the look of Python by a GiVA adapter. `SFTTrainer` gets a
PEFT model and is told nothing else.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from trl import SFTConfig, SFTTrainer

import surgery

LETTERS = [chr(number) for number in range(32, 127)]
LENGTH = 64


def texts() -> tuple[list[str], list[str]]:
    """Paragraphs of English and lines of Python, from the standard library's modules."""
    prose, code = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="ascii", errors="ignore")
        prose += [" ".join(part.split()) for part in (ast.get_docstring(ast.parse(source)) or "").split("\n\n")]
        code += [line.strip() for line in source.splitlines() if line.startswith("        ")]
    return [text[:LENGTH] for text in prose if len(text) > 20], [line for line in code if 20 < len(line) < LENGTH][
        :2000
    ]


def small_model(folder: Path, prose: list[str]) -> None:
    """A language model of letters, trained here for a few seconds, with its tokenizer."""
    words = {"<end>": 0, **{letter: index for index, letter in enumerate(LETTERS, 1)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        part = [prose[(16 * step + index) % len(prose)] for index in range(16)]
        batch = tokenizer(part, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"a base model: loss {loss.item():.3f} on English")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the base, start the adapter, train it with TRL, open what TRL saved."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("trl-out"), help="where models go")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base, start, out = (arguments.out / name for name in ("base", "start", "trained"))
    prose, code = texts()
    small_model(base, prose)
    data = arguments.out / "code.jsonl"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in code))
    surgery.init(base, "giva", start, data=data, rank=16, overwrite=True)

    model = surgery.trainable(start, base)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(arguments.out / "checkpoints"), max_steps=arguments.steps, learning_rate=3e-2, use_cpu=True,
            per_device_train_batch_size=16, logging_steps=20, report_to="none", save_strategy="no", bf16=False,
        ),
        train_dataset=Dataset.from_dict({"text": code}),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(out))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"loss on Python: {losses[0]:.3f} in the first steps, {losses[-1]:.3f} in the last")
    reopened = surgery.Adapter.open(out)
    started = surgery.Adapter.open(start)
    same = [name for name, tensor in reopened.tensors.items() if torch.equal(tensor, started.tensors[name])]
    print(f"{reopened.peft_type}: {len(reopened.tensors)} tensors, {len(same)} of them as they were (the frozen bases)")


if __name__ == "__main__":
    main()
