"""The mirror: a module of `surgery/` or `converters/` has its test file at the same place in `tests/`.

`surgery/storage/locks.py` is tested by `tests/storage/test_locks.py`, `converters/ranks.py` by
`tests/converters/test_ranks.py`. A module without such a file has a line in `ELSEWHERE` that says what tests it.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["ELSEWHERE", "mirror_of", "problems"]

REPORT = "fields and their words: tested by what the command prints, as a table and as JSON"

# A module -> the test files (or folders) that fail when it is wrong, and why it has none of its own.
ELSEWHERE: dict[str, tuple[str, str]] = {
    "converters/report.py": (
        "tests/converters/test_conversion.py tests/converters/test_picture.py",
        REPORT,
    ),
    "surgery/adapters/fitting.py": (
        "tests/merging/test_plan.py tests/models/test_loading.py",
        "tested through the verbs that fit an adapter to a base",
    ),
    "surgery/adapters/format_registry.py": (
        "tests/formats tests/test_plugin.py",
        "an interface; tested through every format",
    ),
    "surgery/adapters/fused.py": (
        "tests/adapters/test_experts.py tests/models/test_write_back.py",
        "tested through layers that are fused in files",
    ),
    "surgery/adapters/lacking.py": (
        "tests/adapters/test_completeness.py",
        "one check with completeness",
    ),
    "surgery/adapters/on_base.py": (
        "tests/properties/test_on_base.py tests/merging/test_merge.py",
        "tested by properties",
    ),
    "surgery/adapters/renaming.py": (
        "tests/models/test_module_names.py tests/merging/test_merge.py",
        "tested through the adapters of older names",
    ),
    "surgery/adapters/source.py": (
        "tests/properties/test_conversions.py tests/converters",
        "tested by properties",
    ),
    "surgery/adapters/types/frod.py": (
        "tests/adapters/test_stock_frod.py",
        "an entry without code",
    ),
    "surgery/adapters/types/vera.py": (
        "tests/adapters/types/test_own.py tests/methods/test_vera.py",
        "read by the formula of the method",
    ),
    "surgery/blending/report.py": ("tests/blending/test_blend.py tests/cli/test_blend.py", REPORT),
    "surgery/cli/convert.py": (
        "tests/converters tests/properties tests/cli/test_failures.py tests/cli/test_options.py",
        "its options are those of the library call",
    ),
    "surgery/exporting/report.py": (
        "tests/cli/test_export.py",
        REPORT,
    ),
    "surgery/initialization/report.py": (
        "tests/cli/test_init.py",
        REPORT,
    ),
    "surgery/inspection/report.py": (
        "tests/cli/test_inspect.py",
        REPORT,
    ),
    "surgery/merging/report.py": (
        "tests/cli/test_merge.py",
        REPORT,
    ),
    "surgery/methods/base.py": (
        "tests/methods tests/adapters/types/test_own.py",
        "abstract: tested through every method",
    ),
    "surgery/methods/catalogue.py": (
        "tests/methods/test_registry.py tests/test_docs.py",
        "a table of words; the registry reads it",
    ),
    "surgery/models/labels.py": (
        "tests/initialization/test_class_labels.py tests/training/test_new_head.py",
        "tested through the verbs that make heads",
    ),
    "surgery/peft_types/hotswap.py": (
        "tests/peft_types/test_torch_modes.py",
        "tested beside what else trainers and servers do, on the same models",
    ),
    "surgery/passes/encoders.py": (
        "tests/passes/test_examples.py tests/passes/test_chats.py",
        "tested through the samples that it makes",
    ),
    "surgery/peft_types/tuner.py": (
        "tests/peft_types/test_layer.py tests/peft_types/test_loading.py",
        "never used without its layers",
    ),
    "surgery/publishing/report.py": (
        "tests/publishing/test_push.py tests/cli/test_push.py",
        REPORT,
    ),
    "surgery/system/memory.py": (
        "benchmarks",
        "one call of the system that changes no result; memory is measured there",
    ),
    "surgery/system/progress.py": (
        "tests/cli/test_progress.py",
        "the name of a type",
    ),
    "surgery/training/report.py": (
        "tests/cli/test_train.py",
        REPORT,
    ),
    "surgery/version.py": (
        "tests/cli/test_main.py",
        "a literal",
    ),
}


def mirror_of(module: str) -> str:
    """Return the place of the test file of a module, both as paths from the root of the repository."""
    path = Path(module.removeprefix("surgery/"))
    return str(Path("tests") / path.parent / f"test_{path.name}")


def problems(root: Path) -> list[str]:
    """Return a line for each module that has neither a test file nor a reason, and for each reason without a need."""
    modules = _modules(root)
    found = []
    for module in modules:
        mirror = mirror_of(module)
        if (root / mirror).is_file():
            if module in ELSEWHERE:
                found.append(f"{module}: {mirror} is there; take its line out of tests/lint/mirror.py")
        elif module not in ELSEWHERE:
            found.append(f"{module}: has no {mirror}; write it, or say in tests/lint/mirror.py what tests the module")
    for module, (tests, _) in ELSEWHERE.items():
        if module not in modules:
            found.append(f"{module}: is not there; take its line out of tests/lint/mirror.py")
        found += [
            f"{module}: {name} is not there; name what tests it in tests/lint/mirror.py"
            for name in tests.split()
            if not (root / name).exists()
        ]
    return found


def _modules(root: Path) -> list[str]:
    folders = [root / "converters", *(path for path in (root / "surgery").rglob("*") if path.is_dir())]
    paths = [path for folder in [root / "surgery", *folders] for path in folder.glob("[!_]*.py")]
    # The link surgery/converters leads to converters/, which counts once.
    return sorted({str(path.relative_to(root)) for path in paths if not (path.parent.is_symlink())})
