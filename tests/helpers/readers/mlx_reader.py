"""Run by the Python of `make servers`: the logits of the last token by mlx-lm, as JSON on stdout.

python mlx_reader.py MODEL ADAPTER|- '[[1, 5, 7], ...]'
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


def main() -> None:
    base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    model, _ = load_model(Path(base))
    if adapter != "-":
        model = load_adapters(model, adapter)
    model.eval()
    found = [model(mx.array([prompt]))[0, -1].astype(mx.float32).tolist() for prompt in prompts]
    print("\n" + json.dumps(found))


main()
