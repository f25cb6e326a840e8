"""Options that are out of range, that a method does not take, or that are no options: one line that names them."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import surgery
from surgery.errors import MethodError
from surgery.system.keywords import SHORT_SPELLINGS
from tests.helpers.bad_input import case, check_refused, check_usage_error
from tests.helpers.command_line import contents, flags, invoke
from tests.helpers.init_runs import command_named

BAD_OPTIONS = [
    *(
        case(f"{method}-rank-{rank}", method, {"rank": rank}, ("rank", f"got {rank}"))
        for method in ("inilora", "inilora-beta", "smoa", "vera")
        for rank in (0, -1)
    ),
    case("smoa-rank-below-groups", "smoa", {"rank": 2, "groups": 3}, ("rank 2", "3 groups", "at least 3")),
    case("smoa-no-groups", "smoa", {"groups": 0}, ("groups", "0")),
    case("smoa-more-groups-than-values", "smoa", {"rank": 40, "groups": 33}, ("33 groups", "q_proj")),
    *(
        case(f"frod-rate-{rate}", "frod", {"sparse_rate": rate}, ("sparse rate", str(rate)))
        for rate in (-0.1, 1.0, 7.0, float("nan"))
    ),
    *(
        case(f"{method}-alpha-{alpha}", method, {"alpha": alpha}, ("alpha", str(alpha)))
        for method in ("inilora", "inilora-alpha")
        for alpha in (0.0, -3.0, float("nan"), float("inf"))
    ),
    case("seed-too-large", "vera", {"seed": 2**64}, ("seed", str(2**64))),
    case("no-such-device", "vera", {"device": "abacus"}, ("'abacus'", "auto, cpu, cuda")),
    case("device-without-use", "vera", {"device": "meta"}, ("meta", "auto, cpu, cuda")),
    case("mps", "vera", {"device": "mps"}, ("mps", "--device cpu")),
]


@pytest.mark.parametrize(("method", "options", "words"), BAD_OPTIONS)
def test_option_out_of_range(method: str, options, words: tuple[str, ...], llama: Path, tmp_path: Path) -> None:
    check_refused(tmp_path, MethodError, words, llama, method, **options)


IDLE_OPTIONS = [
    ("vera", {"alpha": 8.0}, "--alpha"),
    ("vera", {"sparse_rate": 0.1}, "--sparse-rate"),
    ("vera", {"groups": 2}, "--groups"),
    ("inilora", {"sparse_rate": 0.1}, "--sparse-rate"),
    ("inilora-beta", {"groups": 2}, "--groups"),
    ("frod", {"rank": 0}, "--rank"),
    ("frod", {"alpha": 8.0}, "--alpha"),
    ("inilora", {"branch_ranks": [4, 4]}, "--branch-ranks"),
    ("giva", {"alpha": 8.0}, "--alpha"),
    ("frod", {"data": "train.jsonl"}, "--data"),
    ("vera", {"samples": 4}, "--samples"),
    ("inilora", {"batch_size": 4}, "--batch-size"),
    ("smoa", {"max_length": 4}, "--max-length"),
    ("vera", {"gradient_checkpointing": True}, "--gradient-checkpointing"),
    ("frod", {"variant": "vr"}, "--variant"),
    ("inilora", {"split": {"q_proj": 2}}, "--split"),
]


@pytest.mark.parametrize(("method", "options", "flag"), IDLE_OPTIONS)
def test_option_that_the_method_does_not_take(method: str, options, flag: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=f"method {method} takes no {next(iter(options))}"):
        surgery.init(llama, method, tmp_path / "out", **options)
    check_usage_error(
        tmp_path, f"method {method} takes no {flag}", "init", llama, "--method", method, *flags(**options)
    )


@pytest.mark.parametrize(
    ("word", "args"),
    [
        case("unknown-method", "'nope' is not one of 'vera', 'giva', 'inilora'", ["init", "model", "--method", "nope"]),
        case("no-model", "'MODEL'", ["init", "--method", "vera"]),
        case("no-method", "'--method'", ["init", "model"]),
        case("two-models", "(other)", ["init", "--method", "vera", "model", "other"]),
        case("unknown-option", "'--nope'", ["init", "--method", "vera", "model", "--nope"]),
        case("rank-not-a-number", "'--rank'", ["init", "--method", "vera", "model", "--rank", "four"]),
        case("alpha-not-a-number", "'--alpha'", ["init", "--method", "inilora", "model", "--alpha", "x"]),
        case("unknown-task", "'--task'", ["init", "--method", "vera", "model", "--task", "nope"]),
        case("unknown-dtype", "'--dtype'", ["init", "--method", "vera", "model", "--dtype", "int8"]),
        case("quiet-and-verbose", "-q and -v exclude each other", ["init", "--method", "vera", "model", "-q", "-v"]),
        case("unknown-command", "'nope'", ["nope"]),
        case("methods-of-something", "(model)", ["methods", "model"]),
    ],
)
def test_usage_error(word: str, args: list[str], model: Path, tmp_path: Path) -> None:
    check_usage_error(tmp_path, word, *args)


def test_library_names_unknown_method_and_dtype(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="unknown method 'nope'; the methods are vera, giva, inilora"):
        surgery.init(llama, "nope", tmp_path / "out")
    with pytest.raises(MethodError, match="unknown dtype 'int8': use float32, bfloat16, float16"):
        surgery.init(llama, "vera", tmp_path / "out", dtype="int8")
    assert contents(tmp_path) == {}


def test_data_without_a_base_names_the_option() -> None:
    result = invoke("convert", "lora", "--to", "giva", "--data", "texts.jsonl")
    assert result.exit_code == 2 and "give it with --base MODEL" in result.output


def test_options_are_the_words_of_the_library_call() -> None:
    parameters = inspect.signature(surgery.init).parameters
    full = {short: name for name, short in SHORT_SPELLINGS.items()}
    options = {full.get(str(each.name), each.name): each for each in command_named("init").params}
    for name in ("as_json", "quiet", "verbose"):
        del options[name]
    assert set(options) == set(parameters) - {"progress", "loss"}
    defaults = {name: getattr(option, "default", None) for name, option in options.items()}
    for name in ("device", "dtype", "seed"):
        assert defaults[name] == parameters[name].default
