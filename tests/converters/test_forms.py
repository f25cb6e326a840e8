"""The table of forms: what the checks, the command line and the docs read."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.converters import forms
from surgery.converters.forms import BUDGETS, FORMS, Form, FormOption, form_named
from surgery.converters.to_lora import to_lora
from surgery.errors import MethodError


def test_names_are_known_without_torch() -> None:
    code = "import sys; from surgery.converters.forms import FORMS; print(FORMS.names(), 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "['giva', 'vera', 'lora', 'frod', 'smoa'] False"


@pytest.mark.parametrize("name", FORMS.names())
def test_every_form_refuses_what_it_does_not_take(name: str, lora: Path, llama: Path) -> None:
    form = form_named(name)
    assert callable(form.load()) and form.title and form.holds
    with pytest.raises(MethodError, match="unknown dtype"):
        surgery.convert(lora, name, base=llama, dtype="int8")
    for other in FORMS:
        for option in other.options:
            if option not in form.options:
                value = option.choices[0] if option.choices else True
                with pytest.raises(MethodError, match=f"{option.name} belongs to {other.name}"):
                    surgery.convert(lora, name, base=llama, form_options={option.name: value})
    for budget in set(BUDGETS) - set(form.budgets):
        with pytest.raises(MethodError, match=f"{name} takes .* not --{budget.replace('_', '-')}"):
            surgery.convert(lora, name, base=llama, **{budget: 0.5 if budget != "rank" else 1})
    if form.needs_base:
        with pytest.raises(MethodError, match="give the base with --base"):
            surgery.convert(lora, name)


def twice(source: Any, request: Any) -> Any:
    """A form of another package: a LoRA whose factor B is doubled where it is asked for."""
    made = to_lora(source, request)
    if request.options["doubled"] == "yes":
        made.tensors.update({name: t * 2 for name, t in made.tensors.items() if "lora_B" in name})
    return made


ADDED = Form("twice", "a LoRA", "nothing", twice, options=(FormOption("doubled", "no", ("yes", "no"), "twice"),))


def test_a_package_adds_a_form_through_its_entry_point(lora: Path, tmp_path: Path, monkeypatch: Any) -> None:
    point = importlib.metadata.EntryPoint("twice", "tests.converters.test_forms:ADDED", "surgery.forms")
    monkeypatch.setattr(FORMS, "_added", {"twice": point})
    monkeypatch.setattr(FORMS, "_loaded", dict(FORMS._loaded))
    assert forms.FORMS.names()[-1] == "twice"
    _, same = surgery.convert(lora, "twice", tmp_path / "out")
    assert same.to == "twice" and same.weight_error < 1e-6
    _, other = surgery.convert(lora, "twice", accept_loss=True, form_options={"doubled": "yes"})
    assert other.weight_error == pytest.approx(1.0, rel=1e-3)
