"""Sites: names, roles, layers, and the target list that PEFT matches exactly to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from surgery.errors import TargetError
from surgery.methods.inilora import IniloraConfig
from surgery.models.base_model import BaseModel
from surgery.models.sites import linear_sites, select_sites, target_modules, unsupported_modules
from tests.helpers.bad_input import READS_WEIGHTS, case, check_refused, configure
from tests.helpers.command_line import invoke
from tests.helpers.models import build, llama_config, save_model


def matched_by_peft(model: nn.Module, targets: list[str]) -> set[str]:
    """Modules that PEFT would adapt for a target list."""
    config = IniloraConfig(target_modules=targets)
    return {name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)}


EXPECTED = {
    "bert": ("encoder.layer.*.attention.self.query", 12, False),
    "llama": ("layers.*.self_attn.q_proj", 21, False),
    "gpt2": ("h.*.attn.c_attn", 8, True),
    "t5": ("decoder.block.*.layer.1.EncDecAttention.q", 36, False),
    "vit": ("layers.*.attention.q_proj", 12, False),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_default_targets_are_the_linears_of_the_blocks(kind: str) -> None:
    model = build(kind)
    role, count, transposed = EXPECTED[kind]
    sites = select_sites(model)
    assert len(sites) == count
    assert role in {site.role for site in sites}, sorted({site.role for site in sites})
    for site in sites:
        module = model.get_submodule(site.module)
        weight = module.weight.T if site.transposed else module.weight
        assert tuple(weight.shape) == (site.out_features, site.in_features)
        assert site.transposed == transposed
        assert site.layer is not None and site.role == site.key.replace(f".{site.layer}.", ".*.", 1)
    outside = {"pooler.dense", "lm_head", "classifier"}
    assert not outside & {site.module for site in sites}


@pytest.mark.parametrize("kind", EXPECTED)
def test_target_list_matches_exactly_the_sites_in_peft(kind: str) -> None:
    model = build(kind)
    chosen = {
        "all": select_sites(model),
        "first role": [s for s in select_sites(model) if s.role == select_sites(model)[0].role],
        "one block": [s for s in select_sites(model) if s.layer == 1],
        "one": select_sites(model)[3:4],
    }
    for sites in chosen.values():
        targets = target_modules(model, sites)
        assert matched_by_peft(model, targets) == {site.module for site in sites}
    assert len(target_modules(model, chosen["all"])) <= 12


def test_keys_are_the_same_with_and_without_a_head() -> None:
    config = build("bert").config
    bare, headed = transformers.BertModel(config), transformers.BertForSequenceClassification(config)
    assert [s.key for s in select_sites(bare)] == [s.key for s in select_sites(headed)]
    assert [s.module for s in select_sites(bare)] != [s.module for s in select_sites(headed)]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 3),
        (["q_proj", "v_proj"], 6),
        (["self_attn.q_proj"], 3),
        (["model.layers.1.mlp.up_proj"], 1),
        ([r".*layers\.[01]\.self_attn\.(q|k)_proj"], 4),
        (["lm_head"], 1),
        (["all-linear"], 21),
        (["all-linear", "lm_head"], 22),
        (["q_proj", "q_proj"], 3),
    ],
)
def test_targets_by_name_ending_and_expression(targets: list[str], count: int) -> None:
    assert len(select_sites(build("llama"), targets)) == count


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nothing", r"matches no module.*self_attn\.q_proj"),
        ("proj", "matches no module"),  # not the end of a name at a dot
        ("embed_tokens", r"no linear layer, only .*embed_tokens \(Embedding\)"),
        ("(", "not a valid regular expression"),
    ],
)
def test_targets_that_match_nothing(target: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        select_sites(build("llama"), [target])


def test_a_model_without_blocks_lists_what_there_is() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 3)})
    with pytest.raises(TargetError, match=r"no repeated blocks.*Available: a, b"):
        select_sites(model)
    assert [site.module for site in select_sites(model, ["b"])] == ["b"]
    with pytest.raises(TargetError, match="no linear layer"):
        select_sites(nn.ModuleDict({"a": nn.LayerNorm(3)}))


def test_fused_experts_are_listed_and_refused() -> None:
    model = build("mixtral")
    refused = unsupported_modules(model)
    assert any(name.endswith("experts.gate_up_proj") for name in refused), refused
    assert {site.module.rsplit(".", 1)[1] for site in select_sites(model)} >= {"q_proj", "o_proj"}
    with pytest.raises(TargetError, match="fused 3-D expert"):
        select_sites(model, ["gate_up_proj"])


def test_tied_head_is_a_site_of_its_own(tmp_path) -> None:
    """A head tied to the embeddings has no tensor in the file; it is read through the embedding's."""
    model = transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "tied")
    base = BaseModel.open(tmp_path / "tied")
    (site,) = base.select(["lm_head"])
    assert torch.equal(base.weight(site), model.lm_head.weight)


def test_meta_and_real_models_have_the_same_sites(llama) -> None:
    assert linear_sites(BaseModel.open(llama).model) == linear_sites(build("llama"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("mixtral", tmp_path_factory.mktemp("mixtral") / "model")


@pytest.mark.parametrize("method", ["vera", *READS_WEIGHTS])
def test_fused_experts_are_left_out_and_reported(method: str, mixtral: Path, tmp_path: Path) -> None:
    result = invoke("init", mixtral, "--method", method, "-o", tmp_path / "out", "--json")
    report = json.loads(result.stdout)
    assert [site["module"] for site in report["sites"]] == [
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    experts = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
    refused = report["not_adapted"]
    assert [name for name, reason in refused.items() if "3-D" in reason] == experts
    assert [name for name in refused if name not in experts] == [f"model.layers.{n}.mlp.gate" for n in (0, 1)]
    result = invoke("init", mixtral, "--method", method, "-o", tmp_path / "again")
    assert "and 1 more (fused 3-D expert weights)" in result.stderr and experts[0] in result.stderr


@pytest.mark.parametrize("target", ["gate_up_proj", "experts.down_proj", r".*\.experts\..*", "experts"])
def test_fused_experts_are_refused_by_name(target: str, mixtral: Path, tmp_path: Path) -> None:
    check_refused(
        tmp_path, TargetError, (repr(target), "model.layers.0.mlp.experts"), mixtral, target=["q_proj", target]
    )


ROLES = ("layers.*.self_attn.q_proj", "layers.*.mlp.down_proj", "lm_head")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        case("nothing", "no_such_layer", ("'no_such_layer' matches no module", "Available", *ROLES)),
        case("empty", "", ("'' matches no module", *ROLES)),
        case("regex-for-nothing", ".*no_such.*", ("'.*no_such.*' matches no module", *ROLES)),
        case("invalid-regex", "(q_proj", ("'(q_proj'", "not a valid regular expression", "position 0")),
        case("embedding", "embed_tokens", ("no linear layer", "model.embed_tokens (Embedding)", *ROLES)),
        case("norm", "input_layernorm", ("no linear layer", "model.layers.0.input_layernorm (LlamaRMSNorm)", *ROLES)),
        case("block", "layers.0", ("no linear layer", "model.layers.0 (LlamaDecoderLayer)", *ROLES)),
        case("part-of-a-name", "proj", ("'proj' matches no module", *ROLES)),
    ],
)
def test_target_that_matches_no_linear(target: str, words: tuple[str, ...], llama: Path, tmp_path: Path) -> None:
    check_refused(tmp_path, TargetError, words, llama, target=[target])
    check_refused(tmp_path, TargetError, words, llama, target=["q_proj", target])


def test_model_without_repeated_blocks(model: Path, tmp_path: Path) -> None:
    configure(num_hidden_layers=0)(model)
    check_refused(tmp_path, TargetError, ("LlamaForCausalLM", "no repeated blocks", "--target", "lm_head"), model)
