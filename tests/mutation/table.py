"""Which tests must notice a broken formula, by module; the first to be run first."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLDERS", "modules", "tests_of"]

FOLDERS = ("surgery/linalg", "surgery/methods", "converters")
TRUNCATION, ALGEBRA = "properties/test_truncation.py", "properties/test_delta_algebra.py"
CONVERSIONS, ON_BASE, NUMERICS = (f"properties/test_{name}.py" for name in ("conversions", "on_base", "numerics"))
CODING = ("linalg/test_coded.py", "linalg/test_rounding.py", "linalg/test_compress.py", CONVERSIONS)
STARTS = ("methods/test_deltas.py", "test_initialization.py", ON_BASE)

TESTS: dict[str, tuple[str, ...]] = {
    "surgery/codec/factors.py": ("linalg/test_coded.py", "linalg/test_compress.py", CONVERSIONS),
    "surgery/codec/model.py": ("linalg/test_compress.py", CONVERSIONS),
    "surgery/deltas/operators.py": ("linalg/test_delta.py", ALGEBRA),
    "surgery/codec/entropy.py": ("linalg/test_entropy.py", "linalg/test_coded.py"),
    "surgery/codec/feedback.py": ("linalg/test_feedback.py", "linalg/test_rounding.py"),
    "surgery/linalg/joint.py": ("linalg/test_joint.py", "methods/test_frod.py"),
    "surgery/linalg/low_rank.py": ("linalg/test_low_rank.py", TRUNCATION),
    "surgery/linalg/metric.py": ("linalg/test_metric.py", TRUNCATION, CONVERSIONS),
    "surgery/deltas/products.py": ("linalg/test_products.py", ALGEBRA),
    "surgery/codec/layer.py": CODING[1:],
    "surgery/linalg/seeded.py": (
        "linalg/test_seeded.py",
        "methods/test_vera.py",
        "methods/test_inilora.py",
        "compat/test_stored.py",
    ),
    "surgery/deltas/spectrum.py": (TRUNCATION, ALGEBRA),
    "surgery/deltas/sparse.py": ("linalg/test_sparse.py", "linalg/test_delta.py"),
    "surgery/linalg/spectral_groups.py": ("linalg/test_spectral.py", "methods/test_smoa.py"),
    "surgery/linalg/symmetric.py": ("linalg/test_symmetric.py", "linalg/test_joint.py"),
    "surgery/system/threads.py": ("linalg/test_joint.py", "linalg/test_low_rank.py"),
    "surgery/linalg/token_products.py": ("linalg/test_token_products.py", "methods/test_giva.py"),
    "surgery/codec/workers.py": ("linalg/test_compress.py",),
    "surgery/methods/base.py": (*STARTS, "methods/test_inilora.py", "methods/test_frod.py"),
    "surgery/adapters/contents.py": ("methods/test_deltas.py", "methods/test_stock.py", "test_merging.py"),
    "surgery/adapters/weight_change.py": ("methods/test_deltas.py", "methods/test_stock.py"),
    "surgery/methods/frod.py": ("methods/test_frod.py", "methods/test_deltas.py", ON_BASE, "runtime/test_layer.py"),
    "surgery/methods/giva.py": ("methods/test_giva.py", CONVERSIONS),
    "surgery/methods/inilora.py": (
        "methods/test_inilora.py",
        "methods/test_deltas.py",
        NUMERICS,
        "runtime/test_layer.py",
    ),
    "surgery/adapters/lora.py": ("methods/test_deltas.py", "methods/test_stock.py", CONVERSIONS),
    "surgery/adapters/on_base.py": (ON_BASE, "test_merging.py"),
    "surgery/adapters/regeneration.py": (
        "methods/test_regeneration.py",
        "methods/test_inilora.py",
        "methods/test_frod.py",
        "test_merging.py",
    ),
    "surgery/methods/smoa.py": ("methods/test_smoa.py", "methods/test_deltas.py", ON_BASE, "runtime/test_layer.py"),
    "surgery/adapters/stock_types.py": ("methods/test_stock.py",),
    "surgery/methods/vera.py": ("methods/test_vera.py", "methods/test_deltas.py", "converters/test_to_vera.py"),
    "surgery/adapters/source.py": (CONVERSIONS, "test_conversion.py"),
    "converters/frod_fit.py": ("converters/test_to_frod.py",),
    "converters/ranks.py": (CONVERSIONS, "test_conversion.py"),
    "converters/request.py": (CONVERSIONS, "test_conversion.py"),
    "converters/smoa_fit.py": ("converters/test_to_smoa.py",),
    "surgery/adapters/stock_frod.py": ("converters/test_stock_frod.py",),
    "converters/to_frod.py": ("converters/test_to_frod.py",),
    "converters/to_giva.py": (CONVERSIONS, "test_conversion.py"),
    "converters/to_lora.py": (CONVERSIONS, NUMERICS, "test_conversion.py"),
    "converters/to_smoa.py": ("converters/test_to_smoa.py",),
    "converters/to_vera.py": (CONVERSIONS, "converters/test_to_vera.py"),
    "converters/type_config.py": ("converters/test_to_smoa.py", "converters/test_to_vera.py"),
    "converters/vera_random.py": ("converters/test_to_vera.py",),
}


def modules(root: Path) -> list[str]:
    """Every module with formulas, from the root of the repository.

    Raises:
        ValueError: no tests are known for one.
    """
    found = [f"{folder}/{path.name}" for folder in FOLDERS for path in sorted((root / folder).glob("[!_]*.py"))]
    unknown = sorted(set(found) ^ set(TESTS))
    if unknown:
        raise ValueError(f"tests/mutation/table.py does not agree with the tree: {', '.join(unknown)}")
    return found


def tests_of(module: str) -> list[str]:
    """The test files for a module."""
    return [f"tests/{name}" for name in TESTS[module]]
