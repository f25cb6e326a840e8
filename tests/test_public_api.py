"""What `import surgery` offers: its names, the spellings of its keywords, settings as one object, dtypes, devices."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from peft import LoraConfig, get_peft_model

import surgery
from surgery.adapters.format_registry import FORMATS
from surgery.converters.forms import FORMS, FormName
from surgery.errors import OptionError
from surgery.exporting.export import ServerName, export_targets
from surgery.initialization.init import Variant
from surgery.methods.catalogue import MethodName
from surgery.methods.registry import METHODS
from surgery.models.tasks import TASK_TABLE, TaskName
from surgery.passes.data_settings import DataSettings
from surgery.system.dtypes import DTYPES, SHORT, FloatDtype
from surgery.system.keywords import SHORT_SPELLINGS, keywords
from tests.helpers.models import load_base, save_model
from tests.helpers.texts import save_tokenizer, text_rows, write_rows

VERBS = ("init", "convert", "train", "merge", "export", "compare", "inspect", "push", "load", "trainable")
# Keyword -> its short spelling, and the calls that take both.
KEYWORDS: dict[str, tuple[str, set[str]]] = {
    "target_modules": ("target", {"init"}),
    "lora_alpha": ("alpha", {"init"}),
    "max_steps": ("steps", {"train"}),
    "learning_rate": ("lr", {"train"}),
    "gradient_accumulation_steps": ("accumulate", {"train"}),
    "lr_scheduler_type": ("schedule", {"train"}),
    "warmup_ratio": ("warmup", {"train"}),
    "save_steps": ("save_every", {"train"}),
    "overwrite": ("force", {"init", "convert", "train", "merge", "export", "Adapter.save", "Adapter.save_pretrained"}),
}
PAIRS = [(call, name, short) for name, (short, calls) in KEYWORDS.items() for call in sorted(calls)]


def call_named(name: str) -> Callable[..., Any]:
    found: Any = surgery
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, a LoRA of it, and texts."""
    folder = tmp_path_factory.mktemp("api")
    save_tokenizer(save_model("llama", folder / "model"))
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_base(folder / "model"), config).save_pretrained(folder / "lora")
    write_rows(folder / "texts.jsonl", text_rows(24))
    return folder


def test_every_name_is_there_and_none_is_imported_early() -> None:
    code = (
        "import sys, surgery; heavy = {'torch', 'peft', 'transformers', 'scipy', 'numpy', 'filelock'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(surgery.__all__) == {*surgery._HOMES, "__version__"} and set(dir(surgery)) == set(surgery.__all__)
    for name in surgery.__all__:
        assert getattr(surgery, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        surgery.no_such_name  # noqa: B018
    errors = {name for name in surgery.errors.__all__ if name.endswith("Error")}
    assert errors <= set(surgery.__all__)
    assert {*VERBS, "Adapter", "BaseModel", "Delta", "LowRank", "Sum", "ConvertReport", "BatchReport"} <= set(
        dir(surgery)
    )
    assert {config.__name__ for config in (surgery.GivaConfig, surgery.IniloraConfig)} == {
        "GivaConfig",
        "IniloraConfig",
    }


def test_the_table_of_keywords_is_complete() -> None:
    assert {name: short for name, (short, _) in KEYWORDS.items()} == dict(SHORT_SPELLINGS)
    for verb in (*VERBS, "Adapter.save", "Adapter.save_pretrained", "Adapter.open"):
        taken = set(inspect.signature(call_named(verb)).parameters)
        assert taken & set(KEYWORDS) == {name for name, (_, calls) in KEYWORDS.items() if verb in calls}, verb
        assert not taken & set(SHORT_SPELLINGS.values()), verb


@pytest.mark.parametrize(("call", "name", "short"), PAIRS)
def test_both_spellings_are_taken_and_not_together(call: str, name: str, short: str) -> None:
    function = call_named(call)
    with pytest.raises(OptionError, match=f"{name} and {short}, two spellings of one option"):
        function(**{name: 1, short: 1})
    # Whatever a call lacks besides, it is not this keyword: Python names what is missing.
    for spelling in (name, short):
        with pytest.raises(TypeError, match="missing"):
            function(**{spelling: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_option'"):
        function(no_such_option=1)


def test_spellings_reach_the_call() -> None:
    @keywords()
    def verb(first: int, *, max_steps: int = 1, overwrite: bool = False) -> tuple[int, int, bool]:
        return first, max_steps, overwrite

    assert verb(3) == (3, 1, False)
    assert verb(3, steps=5, force=True) == verb(3, max_steps=5, overwrite=True) == (3, 5, True)  # type: ignore[call-arg]
    assert verb(first=3) == (3, 1, False)
    with pytest.raises(TypeError):
        verb(3, first=4)  # type: ignore[misc]
    with pytest.raises(TypeError):
        verb(3, 4)  # type: ignore[misc]


def test_a_whole_run_in_either_spelling(place: Path, tmp_path: Path) -> None:
    one, _ = surgery.init(place / "model", "inilora", rank=2, target_modules=["q_proj"], lora_alpha=6)
    other, _ = surgery.init(place / "model", "inilora", rank=2, target=["q_proj"], alpha=6)  # type: ignore[call-arg]
    assert one.same_as(other) and one.config["lora_alpha" if "lora_alpha" in one.config else "alpha"] == 6
    long = {"max_steps": 2, "learning_rate": 1e-2, "gradient_accumulation_steps": 2, "warmup_ratio": 0.5}
    short = {"steps": 2, "lr": 1e-2, "accumulate": 2, "warmup": 0.5}
    settings = surgery.TrainSettings(batch_size=4, **long)  # type: ignore[arg-type]
    first, second, third = (
        surgery.train(place / "lora", place / "model", place / "texts.jsonl", task="causal-lm", **given)[0]
        for given in ({"batch_size": 4, **long}, {"batch_size": 4, **short}, {"settings": settings})
    )
    assert first.same_as(second) and first.same_as(third)
    assert not first.same_as(surgery.Adapter.open(place / "lora"))


def test_settings_of_data_and_budget_as_one_object(place: Path) -> None:
    lora, texts = place / "lora", place / "texts.jsonl"
    plain, by_keyword = surgery.convert(
        lora, "giva", base=place / "model", data=texts, samples=8, batch_size=4, size=4000, accept_loss=True
    )
    data = surgery.DataSettings(texts, samples=8, batch_size=4)
    budget = surgery.Budget(size="4KB")
    together, report = surgery.convert(lora, "giva", base=place / "model", data=data, budget=budget, accept_loss=True)
    assert plain.same_as(together) and by_keyword.bytes == report.bytes <= 4000
    with pytest.raises(OptionError, match=r"size is given to surgery.convert and in its Budget"):
        surgery.convert(lora, "giva", size=4000, budget=budget)
    with pytest.raises(OptionError, match=r"samples is given to surgery.convert and in its DataSettings"):
        surgery.convert(lora, "giva", base=place / "model", data=data, samples=8)
    with pytest.raises(OptionError, match=r"surgery.compare has no option stats: leave it out of DataSettings"):
        surgery.compare(lora, lora, base=place / "model", data=surgery.DataSettings(texts, stats="stats"))
    with pytest.raises(OptionError, match="samples must be at least 1"):
        surgery.DataSettings(texts, samples=0)


def test_settings_agree_with_the_keywords() -> None:
    """Each field is a keyword of the same default, where the object has one of its own."""
    parameters = inspect.signature(surgery.train).parameters
    for each in fields(surgery.TrainSettings):
        default = getattr(surgery.TrainSettings(), each.name)
        assert (parameters[each.name].default or {}) == (default or {}), each.name
    for kind in (surgery.Budget, DataSettings):
        taken = inspect.signature(surgery.convert).parameters
        assert all(each.name in taken for each in fields(kind))


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16])
def test_dtypes_and_devices_as_torch_has_them(dtype: Any, place: Path, tmp_path: Path) -> None:
    adapter, _ = surgery.init(place / "model", "inilora", rank=2, dtype=dtype, device=torch.device("cpu"))
    assert {tensor.dtype for tensor in adapter.tensors.values() if tensor.is_floating_point()} == {torch.bfloat16}
    made, _ = surgery.convert(place / "lora", "lora", dtype=dtype, device=torch.device("cpu"))
    assert {tensor.dtype for tensor in made.tensors.values()} == {torch.bfloat16}
    report = surgery.merge(
        place / "lora", place / "model", tmp_path / "merged", dtype=dtype, device=torch.device("cpu")
    )
    assert set(report.dtypes) == {"bfloat16"}
    written = surgery.export(place / "lora", "vllm", tmp_path / "served", dtype=dtype, device=torch.device("cpu"))
    assert written.out == str(tmp_path / "served")
    compared = surgery.compare(place / "lora", made, dtype=dtype, device=torch.device("cpu"))
    assert compared.weight_error < 0.01
    model = surgery.trainable(place / "lora", place / "model", dtype=dtype, device="auto", task="causal-lm")
    assert model.get_base_model().dtype == torch.bfloat16
    assert surgery.load(place / "lora", place / "model", dtype=torch.bfloat16).get_base_model().dtype == torch.bfloat16


def words(kind: Any) -> set[Any]:
    """Return the words of a Literal, or of the Literals in a union."""
    if get_origin(kind) is Literal:
        return set(get_args(kind))
    return {word for part in get_args(kind) for word in words(part)}


def test_words_of_the_types_are_those_of_the_tables() -> None:
    assert words(MethodName) == {name for name in METHODS.names() if not METHODS.is_plugin(name)}
    assert words(FormName) == {name for name in FORMS.names() if not FORMS.is_plugin(name)}
    assert words(ServerName) == {name for name in export_targets() if not FORMATS.is_plugin(name)}
    assert words(TaskName) == set(TASK_TABLE)
    assert words(FloatDtype) == {*DTYPES, *SHORT}
    from surgery.methods.giva import VARIANTS

    assert words(Variant) == {*VARIANTS, "blocks", "components"}
    for name in ("bits", "basis", "variant"):
        options = {
            choice for form in FORMS for option in form.options if option.name == name for choice in option.choices
        }
        hints = inspect.get_annotations(inspect.unwrap(surgery.convert), eval_str=True)
        assert {str(word) for word in words(hints[name])} == options, name


def test_the_names_of_transformers_on_an_adapter(place: Path, tmp_path: Path) -> None:
    adapter = surgery.Adapter.from_pretrained(place / "lora")
    size = adapter.save_pretrained(tmp_path / "copy")
    assert size == (tmp_path / "copy" / "adapter_model.safetensors").stat().st_size
    assert surgery.Adapter.open(tmp_path / "copy").same_as(adapter)
    with pytest.raises(surgery.OutputError, match="exists and is not empty"):
        adapter.save_pretrained(tmp_path / "copy")
    adapter.save_pretrained(tmp_path / "copy", overwrite=True)
    adapter.save(tmp_path / "copy", force=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("goal", [{"error": 0.05}, {"energy": 0.99}, {"rank": 3}, {"size": 300}])
def test_one_layer_through_the_codec(goal: dict[str, Any]) -> None:
    torch.manual_seed(1)
    B, A = torch.randn(24, 4) * torch.tensor([1.0, 0.5, 0.2, 0.1]), torch.randn(4, 32)
    coded = surgery.codec.encode_layer(B, A, **goal)
    b, a = surgery.codec.decode_layer(coded.data, coded.shape)
    lost = (torch.linalg.norm(b.double() @ a.double() - B.double() @ A.double()) / torch.linalg.norm(B @ A)).item()
    assert lost == pytest.approx(coded.error, rel=1e-3, abs=1e-6) and coded.shape[:2] == (24, 32)
    assert all(torch.equal(one, two) for one, two in zip(coded.factors(), (b, a), strict=True))
    assert "error" not in goal or lost <= 0.05
    assert "energy" not in goal or lost**2 <= 0.01 + 1e-6
    assert "size" not in goal or coded.data.nbytes <= 300
    assert "rank" not in goal or coded.shape[2] == 3


def test_what_the_codec_refuses() -> None:
    B, A = torch.randn(4, 2), torch.randn(2, 4)
    with pytest.raises(OptionError, match="give one of size"):
        surgery.codec.encode_layer(B, A)
    with pytest.raises(OptionError, match="are no factors"):
        surgery.codec.encode_layer(B, A.T, error=0.1)
    with pytest.raises(OptionError, match="not finite"):
        surgery.codec.encode_layer(B * float("nan"), A, error=0.1)
    with pytest.raises(OptionError, match="bytes do"):
        surgery.codec.encode_layer(B, A, size=1)
    with pytest.raises(OptionError, match="2, 3, 4 or 8"):
        surgery.codec.encode_layer(B, A, error=0.1, bits=5)
    coded = surgery.codec.encode_layer(B, A, error=0.1)
    with pytest.raises(ValueError, match="damaged"):
        surgery.codec.decode_layer(coded.data[:-1], coded.shape)
    with pytest.raises(AttributeError):
        surgery.codec.no_such_name  # noqa: B018
