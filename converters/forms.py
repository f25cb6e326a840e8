"""The forms that `surgery convert` writes: what each holds, what it may lose, its options, and its converter.

Torch is not imported here: the command line and the docs read this table. Our own forms stand in `_OWN`; an installed
package adds a form through the entry point group `surgery.forms`, whose entry points each name a `Form`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from surgery.errors import MethodError
from surgery.system.registry import Registry

if TYPE_CHECKING:
    from surgery.adapters.source import Source
    from surgery.converters.request import Request, Result

__all__ = ["BUDGETS", "FORMS", "Form", "FormName", "FormOption", "form_named"]

# Our own; an installed package may add others.
FormName = Literal["giva", "lora", "vera", "frod", "smoa"] | str

BUDGETS = ("rank", "energy", "max_error", "size", "ratio")
STORED_IN = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class FormOption:
    """An option that one form takes: `--NAME` on the command line, a keyword in Python.

    Attributes:
        name: in Python, `per_layer_ranks`.
        default: its value where it is not given; False for a flag.
        choices: the values that it takes, as text; empty for a flag.
        help: for the command line.
        lossy: values that lose most of a change whatever the size, and want `accept_loss`: why, and what to use.
    """

    name: str
    default: str | bool
    choices: tuple[str, ...]
    help: str
    lossy: Mapping[str, str] = field(default_factory=dict)

    @property
    def flag(self) -> str:
        """How it is written on the command line."""
        return f"--{self.name.replace('_', '-')}"

    def value(self, given: Any) -> Any:
        """Return the value to use for what was given, None for nothing.

        Raises:
            MethodError: it is none of the choices.
        """
        if given is None:
            return self.default
        if not self.choices:
            return bool(given)
        if str(given) not in self.choices:
            raise MethodError(f"{self.name} must be {', '.join(self.choices)}, got {given!r}")
        return str(given)


@dataclass(frozen=True)
class Form:
    """A form that an adapter is converted to.

    Attributes:
        name: as `--to` takes it.
        title: what it is, in a few words.
        holds: what it can hold exactly.
        converter: `module:function` of the function that makes it, or the function: `(Source, Request) -> Result`.
        lossy: whether it is likely to lose most of an adapter, whatever its size.
        single_experts: whether its layers may be single experts of a fused parameter.
        every_kind: whether its layers may be embeddings, convolutions and experts, not linears alone.
        output_biases: whether its layers may add a bias to their outputs.
        gains: whether its layers may have gains on the base weight.
        needs_base: why it needs the base model; empty where it does not.
        options: those that it takes and others do not.
        budgets: the kinds of budget that it takes.
        dtypes: of its stored factors.
        dtype_with: an option and its values beside which `dtype` says anything; None for always.
        default_budget: the budget where none is given; empty keeps all.
    """

    name: str
    title: str
    holds: str
    converter: str | Callable[[Source, Request], Result]
    lossy: bool = False
    single_experts: bool = False
    every_kind: bool = False
    output_biases: bool = False
    gains: bool = False
    needs_base: str = ""
    options: tuple[FormOption, ...] = ()
    budgets: tuple[str, ...] = BUDGETS
    dtypes: tuple[str, ...] = STORED_IN
    dtype_with: tuple[str, tuple[str, ...]] | None = None
    default_budget: Mapping[str, float] = field(default_factory=dict)

    def load(self) -> Callable[[Source, Request], Result]:
        """Import and return the converter."""
        if not isinstance(self.converter, str):
            return self.converter
        module, _, function = self.converter.partition(":")
        found: Callable[[Source, Request], Result] = getattr(importlib.import_module(module), function)
        return found

    def chosen(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of each of the form's options for those given; None stands for one that was not.

        Raises:
            MethodError: one belongs to another form, or has a value that it does not take.
        """
        own = {option.name for option in self.options}
        for name, value in given.items():
            if value not in (None, False) and name not in own:
                others = [form.name for form in FORMS if any(option.name == name for option in form.options)]
                owner = f"belongs to {', '.join(others)}" if others else "is unknown"
                raise MethodError(f"{name} {owner}; {self.name} takes {', '.join(sorted(own) or ['dtype'])}")
        return {option.name: option.value(given.get(option.name)) for option in self.options}

    def check_loss(self, options: Mapping[str, Any]) -> None:
        """Refuse values of options that lose most of a change.

        Raises:
            MethodError: there is one.
        """
        for option in self.options:
            reason = option.lossy.get(str(options[option.name]))
            if reason is not None:
                raise MethodError(f"{option.name} {options[option.name]} of {self.name} {reason}")

    def check_dtype(self, dtype: str | None, options: Mapping[str, Any]) -> None:
        """Refuse a dtype that the form does not store, or would ignore.

        Raises:
            MethodError: it is one of these.
        """
        if dtype is None:
            return
        known = dict.fromkeys(name for form in FORMS for name in form.dtypes)
        if dtype not in known:
            raise MethodError(f"unknown dtype {dtype!r}: use {', '.join(known)}")
        if dtype not in self.dtypes:
            owners = [form.name for form in FORMS if dtype in form.dtypes]
            raise MethodError(f"{dtype} belongs to {', '.join(owners)}; {self.name} takes {', '.join(self.dtypes)}")
        if self.dtype_with is not None and options[self.dtype_with[0]] not in self.dtype_with[1]:
            name, values = self.dtype_with
            raise MethodError(
                f"{self.name} stores codes, not numbers of a dtype: leave out dtype, or give {name} "
                f"{' or '.join(values)}"
            )


_OWN = {
    "giva": Form(
        name="giva",
        title="packed GiVA: integer factors of few bits, and gains",
        holds="any change of low rank, and gains on the base weight (DoRA, IA3), within the rounding of its bits; with "
        "`--energy 1` all of it",
        converter="surgery.converters.to_giva:to_giva",
        every_kind=True,
        gains=True,
        options=(
            FormOption("bits", "auto", ("auto", "32", "16", "8", "4", "3", "2"), "bits of a number"),
        ),
        dtype_with=("bits", ("16", "32")),
        default_budget={"ratio": 20.0},
    ),
    "vera": Form(
        name="vera",
        title="stock VeRA: shared bases, two vectors a layer",
        holds="any change of low rank, in bases of its own, which take more room than a LoRA",
        converter="surgery.converters.to_vera:to_vera",
        lossy=True,
        options=(FormOption("basis", "fitted", ("fitted", "random"), "where A and B come from"),),
        default_budget={"energy": 0.99},
    ),
    "lora": Form(
        name="lora",
        title="stock LoRA: one rank and one scale in all layers",
        holds="any change of low rank",
        converter="surgery.converters.to_lora:to_lora",
        single_experts=True,
        every_kind=True,
        output_biases=True,
        options=(
            FormOption("per_layer_ranks", False, (), "ranks that differ by layer, which some servers misread"),
        ),
        dtypes=(*STORED_IN, "float8_e4m3fn"),
    ),
    "frod": Form(
        name="frod",
        title="portable FRoD: a joint basis of the base's weights with sparse coefficients",
        holds="changes that are sparse in the joint basis of the base's weights",
        converter="surgery.converters.to_frod:to_frod",
        lossy=True,
        needs_base="fits in the joint decomposition of the base's weights",
        budgets=("size", "ratio"),
    ),
    "smoa": Form(
        name="smoa",
        title="SMoA: multiples of the base's spectral components",
        holds="changes that are multiples of the base's weights, entry by entry",
        converter="surgery.converters.to_smoa:to_smoa",
        lossy=True,
        needs_base="fits multiples of the base's weights, entry by entry",
        options=(
            FormOption(
                "variant",
                "components",
                ("components", "blocks"),
                "components of the spectrum, or blocks, as published, which hold about half of a general change and "
                "want --accept-loss",
                {
                    "blocks": "holds about half of a general change, before any rank is cut: use --variant components, "
                    "or --to giva, which holds all of it; --accept-loss makes the blocks"
                },
            ),
        ),
        budgets=("rank", "size", "ratio"),
    ),
}  # fmt: skip
FORMS: Registry[Form] = Registry(
    "surgery.forms", "form", Form, {name: f"surgery.converters.forms:{name.upper()}" for name in _OWN}
)
GIVA, VERA, LORA, FROD, SMOA = _OWN.values()


def form_named(name: str) -> Form:
    """Return the form of this name.

    Raises:
        MethodError: there is none.
    """
    found = FORMS.get(name)
    if found is None:
        raise MethodError(f"unknown form {name!r}: use {', '.join(FORMS.names())}")
    return found
