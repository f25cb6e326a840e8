"""vLLM's own code for a LoRA's configuration, names and weights, as JSON on stdout; run in a process of its own.

python vllm_reader.py FOLDER_OF_VLLM ADAPTER MAX_RANK OUT.safetensors

Of vLLM's wheel, unpacked without what it depends on, these files of `vllm/lora` run as they are: `peft_helper.py`,
`lora_weights.py`, `lora_model.py`, `request.py`, `resolver.py`, and the functions of `utils.py` that read names. What
they import besides is replaced by empty modules. Written are A and B of each layer as vLLM has them after `optimize()`,
which puts the scale into B.
"""

import ast
import importlib
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

NAMES = ("parse_fine_tuned_lora_name", "is_base_embedding_weights", "get_lora_id")


def module(name: str, **content: Any) -> ModuleType:
    """Put a module with this content in vLLM's place."""
    made = ModuleType(name)
    vars(made).update(content)
    sys.modules[name] = made
    return made


def prepare(root: Path) -> None:
    """Make vLLM's files importable without what vLLM depends on."""
    for name in ("vllm", "vllm.lora", "vllm.config", "vllm.utils", "vllm.model_executor", "vllm.model_executor.models"):
        module(name, __path__=[str(root / name.replace(".", "/"))] if name == "vllm.lora" else [])

    def logger(_: str) -> logging.Logger:
        made = logging.getLogger("vllm")
        made.info_once = made.warning_once = made.info  # type: ignore[attr-defined]
        return made

    module("vllm.logger", init_logger=logger)
    module("vllm.config.lora", LoRAConfig=object)
    module("vllm.utils.torch_utils", PIN_MEMORY=False)
    module("vllm.model_executor.models.utils", WeightsMapper=object)
    module("vllm.model_executor.model_loader")
    module("vllm.model_executor.model_loader.tensorizer", TensorizerConfig=object)
    tree = ast.parse((root / "vllm" / "lora" / "utils.py").read_text())
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in NAMES]
    utils = module("vllm.lora.utils", WeightsMapper=object, _GLOBAL_LORA_ID=0)
    exec(compile(ast.Module(wanted, []), "vllm/lora/utils.py", "exec"), vars(utils))


def main() -> None:
    root, adapter, max_rank, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    sys.path.insert(0, str(root))
    prepare(root)
    helper_class = importlib.import_module("vllm.lora.peft_helper").PEFTHelper
    helper = helper_class.from_local_dir(adapter, 4096)
    helper.validate_legal(SimpleNamespace(max_lora_rank=max_rank, bias_enabled=False))
    expected = {target.rsplit(".", 1)[-1] for target in helper.target_modules} | {
        target[target.index("experts.") :] for target in helper.target_modules if ".experts." in target
    }
    model = importlib.import_module("vllm.lora.lora_model").LoRAModel.from_local_checkpoint(
        adapter, expected, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    tensors = {}
    for name, layer in model.loras.items():
        if layer.lora_a is not None:
            layer.optimize()
            tensors[f"{name}.A"], tensors[f"{name}.B"] = layer.lora_a.clone(), layer.lora_b.clone()
    save_file(tensors, out)
    print(json.dumps({"rank": model.rank, "layers": len(tensors) // 2}))


if __name__ == "__main__":
    main()
