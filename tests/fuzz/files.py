"""Ways in which a file itself can be wrong, whatever is in it: absent, of another kind, unreadable, cut, a link."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Canary", "mutate_file"]

# Names that loaders look for, and that pickles have.
PICKLES = (
    "adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "model.pt", "model.ckpt",
    "flax_model.msgpack",
)  # fmt: skip
MODULE = "modeling_canary.py"


class Canary:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def _gone(path: Path, rng: random.Random, root: Path) -> str:
    path.unlink()
    return "gone"


def _folder(path: Path, rng: random.Random, root: Path) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def _fifo(path: Path, rng: random.Random, root: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a pipe"


def _device(path: Path, rng: random.Random, root: Path) -> str:
    device = rng.choice(("/dev/zero", "/dev/null", "/dev/full"))
    path.unlink()
    path.symlink_to(device)
    return f"a link to {device}"


def _unreadable(path: Path, rng: random.Random, root: Path) -> str:
    path.chmod(0)
    return "unreadable"


def _link_out(path: Path, rng: random.Random, root: Path) -> str:
    target = rng.choice((root / "elsewhere" / "secret.txt", root / "elsewhere", root / "elsewhere" / path.name))
    path.unlink()
    path.symlink_to(target)
    return f"a link to {target.relative_to(root)}"


def _link_lost(path: Path, rng: random.Random, root: Path) -> str:
    target = rng.choice((path.name, "nowhere", "../../../../../.."))
    path.unlink()
    path.symlink_to(target)
    return f"a link to {target}"


def _empty(path: Path, rng: random.Random, root: Path) -> str:
    path.write_bytes(b"")
    return "empty"


def _cut(path: Path, rng: random.Random, root: Path) -> str:
    size = path.stat().st_size
    os.truncate(path, rng.randrange(size) if size else 0)
    return f"cut to {path.stat().st_size} bytes"


def _flipped(path: Path, rng: random.Random, root: Path) -> str:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 30))):
        if data:
            data[rng.randrange(min(len(data), 4096))] = rng.randrange(256)
    path.write_bytes(data)
    return "bytes changed"


def _text(path: Path, rng: random.Random, root: Path) -> str:
    what = {
        "null": b"null", "a list": b"[]", "a number": b"5", "deep": b"[" * 100_000, "deep objects": b'{"a":' * 100_000,
        "a giant number": b'{"r": ' + b"9" * 5000 + b"}", "not UTF-8": b'{"r": "\xff\xfe"}',
        "UTF-16": path.read_bytes()[:1000].decode("latin-1").encode("utf-16"), "with a mark": b"\xef\xbb\xbf{}",
        "zeros": bytes(1000), "one space": b" ", "a giant string": b'{"a": "' + b"x" * 3_000_000 + b'"}',
        "many keys": b"{" + b",".join(b'"%d": %d' % (n, n) for n in range(30_000)) + b"}",
        "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "a page": b"<!DOCTYPE html><html>not found</html>",
    }  # fmt: skip
    name = rng.choice(sorted(what))
    path.write_bytes(what[name])
    return name


def _pickle(path: Path, rng: random.Random, root: Path) -> str:
    name = rng.choice(PICKLES)
    with (path.parent / name).open("wb") as file:
        pickle.dump(Canary(root / "canary"), file)
    if rng.random() < 0.6 and path.name.endswith((".safetensors", ".index.json")):
        path.unlink()
        return f"gone, and {name} there"
    return f"beside {name}"


def _code(path: Path, rng: random.Random, root: Path) -> str:
    """A model that brings code of its own, for every kind of thing that a configuration may name."""
    import json

    (path.parent / MODULE).write_text(f"import os\nos.mkdir({str(root / 'canary')!r})\nclass Canary: pass\n")
    name = rng.choice(("config.json", "adapter_config.json", "tokenizer_config.json"))
    place = path.parent / name
    if not place.is_file():
        place = path.parent / ("config.json" if (path.parent / "config.json").is_file() else "adapter_config.json")
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    settings = json.loads(place.read_text())
    settings["auto_map"] = dict.fromkeys(kinds, f"{Path(MODULE).stem}.Canary")
    settings["auto_mapping"] = {"base_model_class": "Canary", "parent_library": Path(MODULE).stem}
    if rng.random() < 0.5 and "architectures" in settings:
        settings["architectures"] = ["Canary"]
    if rng.random() < 0.5 and "model_type" in settings:
        settings["model_type"] = "canary"
    place.write_text(json.dumps(settings))
    return f"beside {MODULE}, which {place.name} names"


def _extra(path: Path, rng: random.Random, root: Path) -> str:
    """Something beside the file that does not belong there."""
    kind = rng.choice(("pipe", "link out", "loop", "hidden", "folder", "index", "card", "shard"))
    beside = path.parent
    if kind == "pipe":
        os.mkfifo(beside / "more.txt")
    elif kind == "link out":
        (beside / "notes.txt").symlink_to(root / "elsewhere" / "secret.txt")
    elif kind == "loop":
        (beside / "again").symlink_to(beside)
    elif kind == "hidden":
        (beside / ".hidden").write_text("x")
    elif kind == "folder":
        (beside / "sub").mkdir()
        (beside / "sub" / "x.txt").symlink_to(root / "elsewhere" / "secret.txt")
    elif kind == "index":
        (beside / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    elif kind == "card":
        (beside / "README.md").write_bytes(b"---\nlicense: [\xff\n---\n# x")
    else:
        shutil.copyfile(path, beside / "model-00002-of-00002.safetensors")
    return f"beside something more: {kind}"


Edit = Callable[[Path, random.Random, Path], str]
EDITS: tuple[Edit, ...] = (
    _gone, _folder, _fifo, _device, _unreadable, _link_out, _link_lost, _empty, _cut, _flipped, _text, _text, _pickle,
    _code, _extra,
)  # fmt: skip


def mutate_file(path: Path, rng: random.Random, root: Path) -> str:
    """Change a file, or put something beside it; what was done.

    Args:
        path: the file.
        rng: chooses.
        root: of the place, with what links lead to in `elsewhere`.
    """
    return f"{path.name}: {rng.choice(EDITS)(path, rng, root)}"
