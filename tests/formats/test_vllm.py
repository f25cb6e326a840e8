"""vLLM: its rule, names and refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import surgery
from surgery.errors import AdapterError
from surgery.formats.vllm import VLLM
from tests.helpers.adapters import make_adapter, weight_changes
from tests.helpers.models import load_base
from tests.helpers.servers import lora


def test_vllms_rule_is_pefts(llama: Path, tmp_path: Path) -> None:
    """Patterns and rsLoRA too, which vLLM reads and the export does not need."""
    folder = make_adapter(
        llama, tmp_path / "lora", lora(["q_proj", "up_proj"], use_rslora=True, rank_pattern={"up_proj": 2})
    )
    want, found = weight_changes(llama, folder), dict(VLLM.changes(folder))
    assert want.keys() == found.keys()
    assert all(torch.allclose(found[name].double(), want[name], atol=1e-6) for name in want)


@pytest.mark.parametrize(
    ("settings", "message"), [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "trained biases")]
)
def test_what_vllm_refuses(settings: dict[str, Any], message: str, llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "lora", lora(["q_proj"], **settings))
    with pytest.raises(AdapterError, match=message):
        list(VLLM.changes(folder))


def test_experts_of_a_fused_parameter_have_names_of_their_own_in_vllm() -> None:
    def base(kind: str) -> Any:
        return SimpleNamespace(config=SimpleNamespace(model_type=kind))

    fused, stem = "model.layers.1.mlp.experts.gate_up_proj.7", "model.layers.1.mlp.experts.7"
    halves = {place.name: place.rows for place in VLLM.pieces(fused, 6, base("qwen3_moe"))}
    turns = {place.name: place.rows for place in VLLM.pieces(fused, 6, base("gpt_oss"))}
    assert halves.keys() == turns.keys() == {f"{stem}.gate_proj", f"{stem}.up_proj"}
    assert [rows.tolist() for rows in halves.values() if rows is not None] == [[0, 1, 2], [3, 4, 5]]
    assert [rows.tolist() for rows in turns.values() if rows is not None] == [[0, 2, 4], [1, 3, 5]]
    down = VLLM.pieces("model.layers.1.mlp.experts.down_proj.7", 6, None)
    assert [(place.name, place.rows) for place in down] == [(f"{stem}.down_proj", None)]
    with pytest.raises(AdapterError, match="depends on the base model: give it with --base"):
        VLLM.pieces(fused, 6, None)
    with pytest.raises(AdapterError, match="vLLM's name for experts of in_proj is not known here"):
        VLLM.pieces("model.layers.1.mlp.experts.in_proj.7", 6, None)


@pytest.mark.filterwarnings("ignore")
def test_fused_experts_go_to_vllm_one_by_one(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tf.Qwen3MoeConfig(vocab_size=61, num_experts=3, num_experts_per_tok=2, **sizes, **heads)
    torch.manual_seed(0)
    base = tf.Qwen3MoeForCausalLM(config)
    base.save_pretrained(tmp_path / "model")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = make_adapter(tmp_path / "model", tmp_path / "lora", lora(["q_proj"], target_parameters=experts))
    with pytest.raises(AdapterError, match="depends on the base model: give it with --base"):
        surgery.export(folder, "vllm", tmp_path / "out")
    report = surgery.export(folder, "vllm", tmp_path / "out", base=tmp_path / "model")
    assert report.exact and report.weight_error == 0
    found = dict(VLLM.changes(tmp_path / "out"))
    opened = peft.PeftModel.from_pretrained(load_base(tmp_path / "model"), folder)
    merged, plain = opened.merge_and_unload().state_dict(), load_base(tmp_path / "model").state_dict()
    for name in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        stem = name.rpartition(".")[0]
        for expert, change in enumerate(merged[name] - plain[name]):
            parts = [found[f"{stem}.{expert}.{part}"] for part in ("gate_proj", "up_proj")]
            mine = torch.cat(parts) if "gate_up" in name else found[f"{stem}.{expert}.down_proj"]
            assert float(change.abs().max()) > 1e-2
            torch.testing.assert_close(mine, change, atol=1e-5, rtol=1e-4)
    with pytest.raises(AdapterError, match="which is of the kind expert, and SGLang reads changes of linear layers"):
        surgery.export(folder, "sglang", tmp_path / "no", base=tmp_path / "model")
