"""What a gradient pass cannot use is refused before it begins, and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import CheckpointError, MethodError, TargetError
from tests.helpers.bad_input import Edit, case, check_refused, entry, nothing, tensor, without_tensor
from tests.helpers.texts import text_rows, write_rows

BAD_GIVA = [
    case("rank", nothing, {"rank": 0}, MethodError, ("rank", "got 0")),
    case("samples", nothing, {"samples": 0}, MethodError, ("samples must be at least 1, got 0",)),
    case("batch-size", nothing, {"batch_size": -1}, MethodError, ("batch_size must be at least 1, got -1",)),
    case("float16", nothing, {"dtype": "float16"}, MethodError, ("float32 or bfloat16", "would underflow")),
    case(
        "bases-from-the-gradient",
        nothing,
        {"variant": "vru2r", "store_bases": False},
        MethodError,
        ("variant vru2r", "store the bases"),
    ),
    case("split-matches-nothing", nothing, {"split": {"c_attn": 3}}, MethodError, ("split c_attn", "no adapted layer")),
    case(
        "split-does-not-divide",
        nothing,
        {"split": {"q_proj": 3}},
        MethodError,
        ("q_proj has 32 outputs, which 3 does not divide",),
    ),
    case(
        "split-of-other-heights",
        nothing,
        {"split": {"q_proj": [30, 3]}},
        MethodError,
        ("q_proj has 32 outputs, not 30 + 3",),
    ),
    case(
        "split-of-two-kinds",
        nothing,
        {"split": {"self_attn.q_proj": 2, "proj": 2}},
        MethodError,
        ("split proj: no adapted layer",),
    ),
    case("missing-weight", without_tensor(), {}, CheckpointError, ("no weights for model.layers.1.self_attn.q_proj",)),
    case("nan-weight", entry(float("nan")), {}, MethodError, ("the loss is nan on batch 1",)),
    case("other-shape", tensor(lambda weight: weight[:-1].clone()), {}, CheckpointError, ("cannot be loaded",)),
    case("no-such-target", nothing, {"target": ["nope"]}, TargetError, ("'nope' matches no module",)),
]


@pytest.mark.parametrize(("edit", "options", "error", "words"), BAD_GIVA)
def test_giva_refused(edit: Edit, options, error, words: tuple[str, ...], learner: Path, tmp_path: Path) -> None:
    edit(learner)
    data = write_rows(tmp_path / "data.jsonl", text_rows(4))
    check_refused(tmp_path, error, words, learner, "giva", data=data, **options)
