"""The keywords of the library's calls: the field's names, their short spellings, and settings given as one object."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, TypeVar, cast

from surgery.errors import OptionError

__all__ = ["SHORT_SPELLINGS", "keywords", "short_of"]

P = ParamSpec("P")
R = TypeVar("R")

# The keyword as transformers and PEFT name it -> the short spelling of 0.1.0, which is accepted as well.
SHORT_SPELLINGS: Mapping[str, str] = {
    "gradient_accumulation_steps": "accumulate",
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lr_scheduler_type": "schedule",
    "max_steps": "steps",
    "overwrite": "force",
    "save_steps": "save_every",
    "target_modules": "target",
    "warmup_ratio": "warmup",
}


def keywords(**settings: type[Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator by which a call accepts the short spellings of its keywords, and settings as one object.

    Args:
        settings: name of a parameter -> a dataclass. Where the parameter is given as such an object, each field that is
            not None becomes the keyword of its name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        by_name = inspect.signature(function).parameters
        parameters = list(by_name)
        positional = [name for name, each in by_name.items() if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        short = {SHORT_SPELLINGS[name]: name for name in parameters if name in SHORT_SPELLINGS}
        verb = f"surgery.{function.__name__}" if "." not in function.__qualname__ else function.__qualname__

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = dict(zip(positional, args, strict=False))
            if len(args) > len(positional) or given.keys() & kwargs.keys():
                return function(*args, **kwargs)  # Python's own TypeError
            for name, value in kwargs.items():
                full = short.get(name, name)
                if full in given or (full != name and full in kwargs):
                    raise OptionError(
                        f"{verb} is given {full} and {short_of(full)}, two spellings of one option: give one of them"
                    )
                given[full] = value
            for name, kind in settings.items():
                if isinstance(given.get(name), kind):
                    _take_apart(verb, name, given, parameters)
            return cast(Callable[..., R], function)(**given)

        return call

    return decorate


def short_of(name: str) -> str:
    """Return the short spelling of a keyword, or the keyword where it has none."""
    return SHORT_SPELLINGS.get(name, name)


def _take_apart(verb: str, parameter: str, given: dict[str, Any], parameters: list[str]) -> None:
    """Replace a settings object by the keywords of its fields.

    Raises:
        OptionError: a field is given as a keyword as well, or the call has no such option.
    """
    value = given.pop(parameter)
    assert is_dataclass(value)
    kind = type(value).__name__
    for each in fields(value):
        setting = getattr(value, each.name)
        if setting is None:
            continue
        if each.name not in parameters:
            raise OptionError(f"{verb} has no option {each.name}: leave it out of {kind}")
        if each.name in given:
            raise OptionError(f"{each.name} is given to {verb} and in its {kind}: give it once")
        given[each.name] = setting
