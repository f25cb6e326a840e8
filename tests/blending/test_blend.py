"""Tests of `surgery blend`, against dense sums and PEFT's own combinations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig
from peft.utils.merge_utils import ties

import surgery
from surgery.blending.combinations import COMBINATIONS
from surgery.cli.blend import HOW
from surgery.errors import AdapterError, OptionError
from tests.helpers.adapters import make_adapter, weight_changes
from tests.helpers.command_line import invoke

ALL = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def members(model_folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of one tiny Llama, by name."""
    base, folder = model_folder("llama"), tmp_path_factory.mktemp("members")
    configs = {
        "lora": LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
        "rslora": LoraConfig(r=3, use_rslora=True, target_modules=["q_proj"], rank_pattern={"layers.1.": 5}),
        "adalora": AdaLoraConfig(init_r=3, total_step=10, target_modules=ALL),
        "dora": LoraConfig(r=2, use_dora=True, target_modules=["v_proj"]),
        "ia3": IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    }
    return {
        name: make_adapter(base, folder / name, config, seed=number)
        for number, (name, config) in enumerate(configs.items())
    }


def _sum(base: Path, terms: list[tuple[float, Path]]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for weight, folder in terms:
        for module, change in weight_changes(base, folder).items():
            total[module] = total.get(module, torch.zeros_like(change)) + weight * change
    return total


def _difference(base: Path, made: Path, expected: dict[str, torch.Tensor]) -> float:
    found = weight_changes(base, made)
    assert found.keys() == expected.keys()
    errors = sum(float((found[name] - change).square().sum()) for name, change in expected.items())
    return (errors / sum(float(change.square().sum()) for change in expected.values())) ** 0.5


@pytest.mark.parametrize(
    ("terms", "with_base"),
    [
        ([(0.7, "lora"), (-0.5, "rslora")], False),
        ([(1.0, "lora"), (2.0, "adalora"), (0.25, "rslora")], False),
        ([(0.7, "lora"), (0.5, "dora")], True),
        ([(0.5, "ia3"), (1.5, "dora")], True),
    ],
)
def test_the_sum_is_exact(
    llama: Path, members: dict[str, Path], tmp_path: Path, terms: list[tuple[float, str]], with_base: bool
) -> None:
    given = [(members[name], weight) for weight, name in terms]
    _, report = surgery.blend(given, tmp_path / "out", base=llama if with_base else None)
    expected = _sum(llama, [(weight, members[name]) for weight, name in terms])
    assert _difference(llama, tmp_path / "out", expected) < 1e-5
    assert _difference(llama, tmp_path / "out", {name: 1.01 * each for name, each in expected.items()}) > 5e-3
    assert [each.weight for each in report.members] == [weight for weight, _ in terms]


def test_what_remains_of_each_member(llama: Path, members: dict[str, Path], tmp_path: Path) -> None:
    first, second = members["lora"], members["rslora"]
    _, report = surgery.blend([(first, 0.7), (second, -0.5)], tmp_path / "out")
    total = _sum(llama, [(0.7, first), (-0.5, second)])
    for folder, row in zip((first, second), report.members, strict=True):
        own = weight_changes(llama, folder)
        inner = sum(float((total[name] * change).sum()) for name, change in own.items())
        squared = sum(float(change.square().sum()) for change in own.values())
        assert row.remains == pytest.approx(inner / squared, rel=1e-4)
        assert row.modules == len(own)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_is_that_of_peft_on_the_changes(
    llama: Path, members: dict[str, Path], tmp_path: Path, density: float
) -> None:
    names = ["lora", "adalora"]
    surgery.blend([(members[name], 1.0) for name in names], tmp_path / "out", how="ties", density=density)
    opened = [surgery.Adapter.open(members[name]) for name in names]
    expected = {
        # From the same numbers to the bit: which entries are the largest depends on the last one.
        module: ties([each.delta(module).dense() for each in opened], torch.ones(2), density).double()
        for module in weight_changes(llama, members["lora"])
    }
    assert _difference(llama, tmp_path / "out", expected) < 1e-4


def test_dare_is_drawn_from_its_seed_and_keeps_what_it_expects(
    llama: Path, members: dict[str, Path], tmp_path: Path
) -> None:
    given = [(members["lora"], 1.0), (members["adalora"], 1.0)]
    made = [
        surgery.blend(given, None, how="dare", density=0.5, seed=seed, dry_run=True)[0]
        .delta("model.layers.0.self_attn.q_proj")
        .dense()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    average = torch.stack(
        [
            surgery.blend(given, None, how="dare", seed=seed, dry_run=True)[0]
            .delta("model.layers.0.self_attn.q_proj")
            .dense()
            for seed in range(12)
        ]
    ).mean(0)
    whole = _sum(llama, [(1.0, members["lora"]), (1.0, members["adalora"])])["model.layers.0.self_attn.q_proj"]
    assert float(torch.nn.functional.cosine_similarity(average.flatten().double(), whole.flatten(), dim=0)) > 0.9


def test_budgets_and_forms_are_those_of_convert(llama: Path, members: dict[str, Path], tmp_path: Path) -> None:
    given = [members["lora"], members["rslora"]]
    _, report = surgery.blend(given, tmp_path / "cut", rank=3)
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 3
    assert 0 < report.converted.weight_error < 1
    made, report = surgery.blend(given, tmp_path / "giva", "giva", ratio=4)
    assert made.peft_type == "GIVA" and report.converted.ratio >= 4
    expected = _sum(llama, [(1.0, folder) for folder in given])
    found = surgery.Adapter.open(tmp_path / "giva")
    errors = sum(float((found.delta(m).dense().double() - each).square().sum()) for m, each in expected.items())
    norm = sum(float(each.square().sum()) for each in expected.values())
    assert (errors / norm) ** 0.5 == pytest.approx(report.converted.weight_error, rel=1e-3)


def test_a_head_is_taken_from_the_member_that_is_named(llama: Path, tmp_path: Path) -> None:
    both = [
        make_adapter(
            llama, tmp_path / f"m{seed}", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), seed
        )
        for seed in (1, 2)
    ]
    with pytest.raises(OptionError, match=r"--head"):
        surgery.blend(both, tmp_path / "out")
    with pytest.raises(OptionError, match="is no member"):
        surgery.blend(both, tmp_path / "out", head=tmp_path)
    made, report = surgery.blend(both, tmp_path / "out", head=both[1])
    name = "base_model.model.lm_head.weight"
    assert torch.equal(made.tensors[name], surgery.Adapter.open(both[1]).tensors[name])
    assert report.head == str(both[1]) and "left out" in report.notes[-1]


def _edited(folder: Path, out: Path, **changes: object) -> Path:
    adapter = surgery.Adapter.open(folder)
    adapter.config |= changes
    adapter.save(out)
    return out


def test_what_cannot_be_blended_is_refused_by_name(members: dict[str, Path], tmp_path: Path) -> None:
    lora, rslora = members["lora"], members["rslora"]
    out = tmp_path / "out"
    with pytest.raises(OptionError, match=f"{lora.name}: is the same adapter as .*--repeated"):
        surgery.blend([lora, lora], out)
    with pytest.raises(OptionError, match="no finite number"):
        surgery.blend([(lora, float("nan")), rslora], out)
    with pytest.raises(OptionError, match="all weights are zero"):
        surgery.blend([(lora, 0.0), (rslora, 0.0)], out)
    with pytest.raises(OptionError, match="at least two"):
        surgery.blend([lora], out)
    with pytest.raises(AdapterError, match=r"is of one, .*is of two: blend adds adapters of one base"):
        surgery.blend(
            [
                _edited(lora, tmp_path / "one", base_model_name_or_path="one"),
                _edited(rslora, tmp_path / "two", base_model_name_or_path="two"),
            ],
            out,
        )
    wider = surgery.Adapter.open(rslora)
    name = next(name for name in wider.tensors if "lora_A" in name)
    wider.tensors[name] = torch.cat([wider.tensors[name], wider.tensors[name]], 1)
    wider.save(tmp_path / "wider")
    with pytest.raises(AdapterError, match="in different members"):
        surgery.blend([lora, tmp_path / "wider"], out)
    with pytest.raises(AdapterError, match="depends on its base model"):
        surgery.blend([lora, members["dora"]], out)
    assert not out.exists()
    made, _ = surgery.blend([lora, lora], out, repeated=True)
    assert made.peft_type == "LORA"


def test_on_the_command_line(members: dict[str, Path], tmp_path: Path) -> None:
    done = invoke("blend", f"{members['lora']}=0.5", members["rslora"], "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "remains" in done.output and "0.5" in done.output
    shown = invoke("blend", f"{members['lora']}=0.5", members["rslora"], "-o", tmp_path / "two", "--json")
    found = json.loads(shown.stdout)
    assert found["command"] == "blend" and [each["weight"] for each in found["members"]] == [0.5, 1.0]
    again = invoke("blend", members["lora"], members["rslora"], "-o", tmp_path / "out")
    assert again.exit_code == 1 and "exists" in again.output
    odd = invoke("blend", f"{members['lora']}=much", members["rslora"], "-o", tmp_path / "three")
    assert odd.exit_code == 1 and "write ADAPTER=WEIGHT" in odd.output
    density = invoke("blend", members["lora"], members["rslora"], "--density", "0.5", "-o", tmp_path / "four")
    assert density.exit_code == 1 and "drops no entries" in density.output


def test_the_commands_choices_are_the_table() -> None:
    assert tuple(COMBINATIONS) == HOW
