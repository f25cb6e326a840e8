"""The plugin against vLLM's own registry and request classes, as JSON on stdout; run in a process of its own.

python vllm_resolver.py FOLDER_OF_VLLM BASE NAME...

SURGERY_ADAPTERS and SURGERY_ADAPTERS_CACHE are set by the caller, as for vLLM.
"""

import asyncio
import importlib
import json
import sys
from pathlib import Path

from vllm_reader import prepare


def main() -> None:
    root, base, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    prepare(root)
    sys.path.append(str(root))
    registry = importlib.import_module("vllm.lora.resolver").LoRAResolverRegistry
    importlib.import_module("surgery.serving.vllm_plugin").register()
    resolver = registry.get_resolver("surgery")
    found = {}
    for name in names:
        request = asyncio.run(resolver.resolve_lora(base, name))
        found[name] = None if request is None else [request.lora_name, request.lora_int_id, request.lora_path]
    print("\n" + json.dumps(found))


main()
