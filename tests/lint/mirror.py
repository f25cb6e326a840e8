"""The mirror: a module of `surgery/` or `converters/` has its test file at the same place in `tests/`.

`surgery/storage/locks.py` is tested by `tests/storage/test_locks.py`, `converters/ranks.py` by
`tests/converters/test_ranks.py`. A module without such a file has a line in `ELSEWHERE` that says what tests it.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["ELSEWHERE", "mirror_of", "problems"]

# A module -> the test files (or folders) that fail when it is wrong, and why it has none of its own.
ELSEWHERE: dict[str, tuple[str, str]] = {}


def mirror_of(module: str) -> str:
    """Return the place of the test file of a module, both as paths from the root of the repository."""
    path = Path(module.removeprefix("surgery/"))
    return str(Path("tests") / path.parent / f"test_{path.name}")


def problems(root: Path) -> list[str]:
    """Return a line for each module without a test file and without a reason, and for each reason that is out of date."""
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
