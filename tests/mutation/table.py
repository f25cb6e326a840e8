"""Which tests must notice a broken formula, by module; the first to be run first."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLDERS", "modules", "tests_of"]

ROOT = Path(__file__).parents[2]
FOLDERS = (
    "surgery/adapters",
    "surgery/adapters/types",
    "surgery/codec",
    "surgery/deltas",
    "surgery/linalg",
    "surgery/methods",
    "surgery/models",
    "converters",
)
TRUNCATION, ALGEBRA = "properties/test_truncation.py", "properties/test_delta_algebra.py"
CONVERSIONS, ON_BASE, NUMERICS = (f"properties/test_{name}.py" for name in ("conversions", "on_base", "numerics"))
CODING = ("codec/test_factors.py", "codec/test_layer.py", "codec/test_model.py", CONVERSIONS)
STARTS = ("adapters/test_contents.py", "initialization/test_init.py", ON_BASE)

TESTS: dict[str, tuple[str, ...]] = {
    "surgery/codec/factors.py": (
        "codec/test_model.py",
        CONVERSIONS,
    ),
    "surgery/codec/model.py": (CONVERSIONS,),
    "surgery/deltas/operators.py": (ALGEBRA,),
    "surgery/codec/entropy.py": ("codec/test_factors.py",),
    "surgery/codec/feedback.py": ("codec/test_layer.py",),
    "surgery/linalg/joint.py": ("methods/test_frod.py",),
    "surgery/linalg/low_rank.py": (TRUNCATION,),
    "surgery/linalg/metric.py": (
        TRUNCATION,
        CONVERSIONS,
    ),
    "surgery/deltas/products.py": (ALGEBRA,),
    "surgery/codec/layer.py": (
        "codec/test_model.py",
        CONVERSIONS,
    ),
    "surgery/linalg/seeded.py": (
        "methods/test_vera.py",
        "methods/test_inilora.py",
        "compat/test_stored.py",
    ),
    "surgery/deltas/spectrum.py": (
        TRUNCATION,
        ALGEBRA,
    ),
    "surgery/deltas/sparse.py": ("deltas/test_operators.py",),
    "surgery/linalg/spectral_groups.py": ("methods/test_smoa_components.py",),
    "surgery/linalg/symmetric.py": ("linalg/test_joint.py",),
    "surgery/system/threads.py": (
        "linalg/test_joint.py",
        "linalg/test_low_rank.py",
    ),
    "surgery/linalg/token_products.py": ("methods/test_giva.py",),
    "surgery/codec/workers.py": ("codec/test_model.py",),
    "surgery/methods/base.py": (
        "adapters/test_contents.py",
        "initialization/test_init.py",
        ON_BASE,
        "methods/test_inilora.py",
        "methods/test_frod.py",
    ),
    "surgery/adapters/contents.py": (
        "adapters/types/test_base.py",
        "merging/test_merge.py",
        "merging/test_plan.py",
    ),
    "surgery/methods/frod.py": (
        "adapters/test_contents.py",
        ON_BASE,
        "peft_types/test_layer.py",
    ),
    "surgery/methods/giva.py": (CONVERSIONS,),
    "surgery/methods/inilora.py": (
        "adapters/test_contents.py",
        NUMERICS,
        "peft_types/test_layer.py",
    ),
    "surgery/adapters/on_base.py": (
        ON_BASE,
        "merging/test_merge.py",
        "merging/test_plan.py",
    ),
    "surgery/methods/regeneration.py": (
        "methods/test_inilora.py",
        "methods/test_frod.py",
        "merging/test_merge.py",
        "merging/test_plan.py",
    ),
    "surgery/deltas/blocks.py": ("peft_types/test_layer.py",),
    "surgery/linalg/single_spectrum.py": ("linalg/test_spectral_scores.py",),
    "surgery/linalg/spectral_scores.py": ("methods/test_smoa.py",),
    "surgery/methods/smoa.py": (
        "methods/test_smoa_components.py",
        "adapters/test_contents.py",
        ON_BASE,
        "peft_types/test_layer.py",
    ),
    "surgery/methods/vera.py": (
        "adapters/test_contents.py",
        "converters/test_to_vera.py",
    ),
    "surgery/adapters/source.py": (
        CONVERSIONS,
        "converters/test_convert.py",
    ),
    "converters/frod_fit.py": ("converters/test_to_frod.py",),
    "converters/batch_members.py": ("converters/test_batch.py",),
    "converters/budget_search.py": ("converters/test_conversion.py",),
    "converters/conversion.py": (
        "converters/test_convert.py",
        "converters/test_kept.py",
    ),
    "converters/forms.py": ("converters/test_convert.py",),
    "converters/kept.py": ("converters/test_conversion.py",),
    "converters/ranks.py": (
        CONVERSIONS,
        "converters/test_convert.py",
    ),
    "converters/request.py": (
        CONVERSIONS,
        "converters/test_convert.py",
    ),
    "converters/saved_tensors.py": ("converters/test_conversion.py",),
    "converters/smoa_fit.py": ("converters/test_to_smoa.py",),
    "converters/to_giva.py": (
        CONVERSIONS,
        "converters/test_convert.py",
    ),
    "converters/to_lora.py": (
        CONVERSIONS,
        NUMERICS,
        "converters/test_convert.py",
    ),
    "converters/to_vera.py": (CONVERSIONS,),
    "converters/type_config.py": (
        "converters/test_to_smoa.py",
        "converters/test_to_vera.py",
    ),
    "converters/vera_random.py": ("converters/test_to_vera.py",),
}


def modules(root: Path) -> list[str]:
    """Return every module with formulas, from the root of the repository.

    Raises:
        ValueError: the table names a module that is not there.
    """
    found = [f"{folder}/{path.name}" for folder in FOLDERS for path in sorted((root / folder).glob("[!_]*.py"))]
    gone = [module for module in TESTS if not (root / module).is_file()]
    if gone:
        raise ValueError(f"tests/mutation/table.py does not agree with the tree: {', '.join(gone)}")
    return found


def tests_of(module: str, root: Path = ROOT) -> list[str]:
    """Return the test files for a module: that of its name, and others by the table; else those of its package."""
    path = Path(module.removeprefix("surgery/"))
    mirror = Path("tests") / path.parent / f"test_{path.name}"
    named = [str(mirror)] if (root / mirror).is_file() else []
    others = [f"tests/{name}" for name in TESTS.get(module, ())]
    folder = mirror.parent if (root / mirror.parent).is_dir() else mirror.parent.parent
    return list(dict.fromkeys([*named, *others])) or [str(folder)]
