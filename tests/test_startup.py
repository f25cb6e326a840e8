"""What is imported for a command that does not need it: transformers and PEFT take seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest

from surgery.system.import_order import LIGHT
from tests.helpers.models import load_base, save_model

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "matplotlib")


@pytest.fixture(scope="module")
def loras(model_folder_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRAs of the tiny Llama."""
    place = tmp_path_factory.mktemp("loras")
    for name, rank in (("a", 4), ("b", 2)):
        config = peft.LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(load_base(model_folder_once), config).save_pretrained(place / name)
    return place


@pytest.fixture(scope="module")
def model_folder_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama") / "model")


def heavy(code: str, code_at_end: int = 0) -> set[str]:
    """Return which heavy packages a program has imported when it ends."""
    check = f"import atexit, sys; atexit.register(lambda: print('heavy:', *({set(HEAVY)} & set(sys.modules))))\n"
    result = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True, check=False)
    assert result.returncode == code_at_end, result.stderr
    return set(result.stdout.splitlines()[-1].split()[1:])


PUSH = ["push", "a", "me/lora", "--base-model", "me/base", "--dry-run"]


@pytest.mark.parametrize(
    "words", [["inspect", "a"], ["inspect", "a", "-v", "--json"], ["compare", "a", "b"], [*PUSH, "--json"]]
)
def test_an_adapter_by_itself_needs_neither_transformers_nor_peft(words: list[str], loras: Path) -> None:
    arguments = [str(loras / word) if word in {"a", "b"} else word for word in words]
    drawn = {"matplotlib"} if words[0] == "push" else set()  # the picture of the card
    found = heavy(f"import sys; sys.argv[1:] = {arguments!r}; from surgery.cli import main; main()")
    assert found <= {"torch", *drawn}


@pytest.mark.parametrize(
    "imports",
    [
        "import surgery, peft",
        "import peft, surgery",
        "import surgery.methods.base",
        "import surgery.methods.giva",
        "import surgery.methods.vera, surgery",
        "import surgery.peft_types.layer",
        "import surgery.peft_types.loading",
        "import surgery.training.train",
        "from surgery.methods.registry import method_for_type; method_for_type('FROD_PORTABLE')",
    ],
)
def test_our_types_are_known_whatever_is_imported_first(imports: str) -> None:
    code = f"{imports}\nfrom peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\n"
    code += "assert {'GIVA', 'INILORA', 'FROD_PORTABLE', 'SMOA'} <= {str(getattr(k, 'value', k)) for k in known}\n"
    heavy(code)


def test_light_modules_do_not_import_peft() -> None:
    names = ", ".join(sorted(LIGHT))
    assert heavy(f"import {names}") <= {"torch"}


def test_prefixes_are_pefts() -> None:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    from surgery.adapters.types.registry import ADAPTER_TYPES

    theirs = {str(getattr(kind, "value", kind)): prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()}
    ours = {kind.peft_type: kind.prefix for kind in ADAPTER_TYPES if kind.prefix}
    assert {"LORA", "VERA"} <= set(ours) and {kind: theirs[kind] for kind in ours} == ours


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["init", "missing", "--method", "inilora", "-o", "FULL"], 1),
        (["merge", "missing", "--base", "missing", "-o", "FULL"], 1),
        (["train", "missing", "--base", "missing", "--data", "missing", "-o", "FULL"], 1),
        (["init", "missing", "--method", "inilora", "--rank", "0"], 1),
        (["init", "missing", "--method", "inilora", "--nope"], 2),
        (["compare", "a", "b", "--data", "x"], 2),
        (["convert", "missing", "--to", "giva", "-o", "FULL"], 1),
        (["convert", "missing", "--to", "lora", "--rank", "0"], 1),
        (["convert", "missing", "--to", "giva", "--ratio", "-1"], 1),
        (["convert", "missing", "--to", "giva", "--nope"], 2),
    ],
)
def test_what_is_wrong_at_sight_is_said_before_torch_is_imported(words: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "missing").mkdir()
    places = {"FULL": tmp_path / "full", "missing": tmp_path / "missing"}
    arguments = [str(places.get(word, word)) for word in words]
    assert heavy(f"import sys; sys.argv[1:] = {arguments!r}; from surgery.cli import main; main()", code) == set()
