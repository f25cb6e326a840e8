"""Run by the Python of `make servers`: the log-probabilities of the next token by llama.cpp, as JSON on stdout.

python llama_cpp_reader.py BASE.gguf ADAPTER.gguf|- '[[1, 5, 7], ...]'
"""

import json
import sys

import xllamacpp as xlc


def main() -> None:
    base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    params = xlc.CommonParams()
    params.model.path = base
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    params.n_gpu_layers = 0
    if adapter != "-":
        lora = xlc.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        params.lora_adapters = [lora]
    server = xlc.Server(params)
    found = []
    for prompt in prompts:
        request = {"prompt": prompt, "max_tokens": 1, "logprobs": 1000, "temperature": 1.0, "cache_prompt": False}
        answer = server.handle_completions(request)
        choices = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({str(each["id"]): each["logprob"] for each in choices})
    print("\n" + json.dumps(found))


main()
