"""What `import surgery` offers: its names, the spellings of its keywords, settings as one object, dtypes, devices."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

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
from tests.helpers.calls import VERBS


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


def test_a_whole_run_in_either_spelling(calls_place: Path, tmp_path: Path) -> None:
    one, _ = surgery.init(calls_place / "model", "inilora", rank=2, target_modules=["q_proj"], lora_alpha=6)
    other, _ = surgery.init(calls_place / "model", "inilora", rank=2, target=["q_proj"], alpha=6)  # type: ignore[call-arg]
    assert one.same_as(other) and one.config["lora_alpha" if "lora_alpha" in one.config else "alpha"] == 6
    long = {"max_steps": 2, "learning_rate": 1e-2, "gradient_accumulation_steps": 2, "warmup_ratio": 0.5}
    short = {"steps": 2, "lr": 1e-2, "accumulate": 2, "warmup": 0.5}
    settings = surgery.TrainSettings(batch_size=4, **long)  # type: ignore[arg-type]
    first, second, third = (
        surgery.train(
            calls_place / "lora", calls_place / "model", calls_place / "texts.jsonl", task="causal-lm", **given
        )[0]
        for given in ({"batch_size": 4, **long}, {"batch_size": 4, **short}, {"settings": settings})
    )
    assert first.same_as(second) and first.same_as(third)
    assert not first.same_as(surgery.Adapter.open(calls_place / "lora"))


def test_settings_of_data_and_budget_as_one_object(calls_place: Path) -> None:
    lora, texts = calls_place / "lora", calls_place / "texts.jsonl"
    plain, by_keyword = surgery.convert(
        lora, "giva", base=calls_place / "model", data=texts, samples=8, batch_size=4, size=4000, accept_loss=True
    )
    data = surgery.DataSettings(texts, samples=8, batch_size=4)
    budget = surgery.Budget(size="4KB")
    together, report = surgery.convert(
        lora, "giva", base=calls_place / "model", data=data, budget=budget, accept_loss=True
    )
    assert plain.same_as(together) and by_keyword.bytes == report.bytes <= 4000
    with pytest.raises(OptionError, match=r"size is given to surgery.convert and in its Budget"):
        surgery.convert(lora, "giva", size=4000, budget=budget)
    with pytest.raises(OptionError, match=r"samples is given to surgery.convert and in its DataSettings"):
        surgery.convert(lora, "giva", base=calls_place / "model", data=data, samples=8)
    with pytest.raises(OptionError, match=r"surgery.compare has no option stats: leave it out of DataSettings"):
        surgery.compare(lora, lora, base=calls_place / "model", data=surgery.DataSettings(texts, stats="stats"))
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


def test_the_names_of_transformers_on_an_adapter(calls_place: Path, tmp_path: Path) -> None:
    adapter = surgery.Adapter.from_pretrained(calls_place / "lora")
    size = adapter.save_pretrained(tmp_path / "copy")
    assert size == (tmp_path / "copy" / "adapter_model.safetensors").stat().st_size
    assert surgery.Adapter.open(tmp_path / "copy").same_as(adapter)
    with pytest.raises(surgery.OutputError, match="exists and is not empty"):
        adapter.save_pretrained(tmp_path / "copy")
    adapter.save_pretrained(tmp_path / "copy", overwrite=True)
    adapter.save(tmp_path / "copy", force=True)  # type: ignore[call-arg]
