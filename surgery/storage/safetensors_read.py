"""The safetensors files of a checkpoint folder: which tensor lies in which file, and reading one of them.

A file is opened for each read, so that the memory-mapped pages of a large checkpoint do not pile up in the process:
a mapping ends with the tensor that was read through it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from surgery.errors import CheckpointError, first_line, listing
from surgery.storage.json_files import read_json

__all__ = [
    "DTYPE_CODES",
    "SINGLE_FILE",
    "UNREADABLE",
    "TensorFiles",
    "file_bytes",
    "file_identity",
    "file_order",
    "files_from_index",
    "read_tensor",
    "read_tensors",
    "tensor_names",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# What opening and reading a file may end with: torch, which maps it once more, calls what the system refuses a
# RuntimeError.
UNREADABLE = (OSError, SafetensorError, RuntimeError)

# How the format calls the dtypes, in the order in which the library writes them.
DTYPE_CODES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    **({torch.float8_e8m0fnu: "F8_E8M0"} if hasattr(torch, "float8_e8m0fnu") else {}),  # since torch 2.7
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_order(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """The names of tensors in the order in which the library writes them: by dtype, then by name."""
    places = {dtype: place for place, dtype in enumerate(DTYPE_CODES)}
    return sorted(dtypes, key=lambda name: (places[dtypes[name]], name))


def file_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """The size of a safetensors file with these tensors, without writing it; they may be on the meta device.

    Eight bytes say how long the header is; the header is JSON, padded with spaces to eight bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in file_order({name: tensor.dtype for name, tensor in tensors.items()}):
        end = offset + tensors[name].nbytes
        code = DTYPE_CODES[tensors[name].dtype]
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + -length % 8 + offset


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors in one safetensors file, in the file's order; only the header is read.

    Raises:
        CheckpointError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except UNREADABLE as error:
        raise CheckpointError(_broken_file(path, error)) from None


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor onto the CPU, in the file's dtype: a view of the mapped file, which goes when it goes.

    Raises:
        CheckpointError: the file is broken or lacks the tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118 - not a dictionary
                raise CheckpointError(f"{path}: has no tensor {name}, which the index says is there")
            tensor: torch.Tensor = file.get_tensor(name)
    except UNREADABLE as error:
        raise CheckpointError(f"{_broken_file(path, error)} (reading tensor {name})") from None
    _check_dtype(path, name, tensor)
    return tensor


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file on the CPU, in the file's dtypes: views of the mapped file.

    Raises:
        CheckpointError: the file is broken, or holds what cannot be computed with.
    """
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)})") from None
    for name, tensor in tensors.items():
        _check_dtype(path, name, tensor)
    return tensors


def _check_dtype(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Check that torch can compute with a tensor; its 4-bit floats, two to a byte, it can only carry.

    Raises:
        CheckpointError: it cannot.
    """
    if tensor.dtype not in DTYPE_CODES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{path}: tensor {name} is {kind}, which cannot be computed with; save it in bfloat16")


class TensorFiles:
    """The weights of a checkpoint folder, as a map from tensor name to file.

    Attributes:
        folder: where the files lie.
        files: tensor name -> path of the safetensors file that holds it.
    """

    def __init__(self, folder: Path, files: Mapping[str, Path]) -> None:
        self.folder = folder
        self.files = dict(files)
        self._seen = {path: file_identity(path) for path in set(self.files.values())}

    @classmethod
    def open(cls, folder: Path) -> TensorFiles:
        """Find the single file or the sharded index in `folder`; no tensor is read.

        Raises:
            CheckpointError: there are no safetensors, the index is broken or names a file that is missing or
                lies outside the folder.
        """
        single = folder / SINGLE_FILE
        if single.is_file():  # first, as transformers does where both are there
            return cls(folder, dict.fromkeys(tensor_names(single), single))
        if (folder / INDEX_FILE).is_file():
            return cls(folder, files_from_index(folder / INDEX_FILE))
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(
                f"{folder}: only pickle weights ({listing(pickles, 3)}), which can run code when opened; convert "
                "them to safetensors first (model.save_pretrained in transformers writes safetensors)"
            )
        raise CheckpointError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}")

    def read(self, name: str) -> torch.Tensor:
        """Read the tensor called `name` in the checkpoint.

        Raises:
            CheckpointError: the file is broken, lacks the tensor, or is another than it was when it was opened.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.folder}: has no tensor {name} in its index")
        self.check_unchanged(self.files[name])
        return read_tensor(self.files[name], name)

    def check_unchanged(self, *paths: Path) -> None:
        """Check that files, all of them by default, are those that were opened: weights of two versions do not mix.

        Raises:
            CheckpointError: one was replaced or written to.
        """
        for path in paths or self._seen:
            if file_identity(path) != self._seen[path]:
                raise CheckpointError(f"{path}: has changed while it was read; run it again when nobody writes there")


def file_identity(path: Path) -> tuple[int, ...]:
    """What is another once a file was replaced or written to; nothing for one that is not there.

    Size and time of change do not tell a file from another that was put in its place with the time of the old one: the
    time of its last change of any kind and its number on the disk do.
    """
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino


def files_from_index(path: Path) -> dict[str, Path]:
    """The file of each tensor, by an index of safetensors files beside it.

    Raises:
        CheckpointError: the index is broken, or names a file that is missing or lies outside its folder.
    """
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map")
    files: dict[str, Path] = {}
    for name, file_name in weight_map.items():
        # A name such as ../other.safetensors must never lead out of the checkpoint's own folder.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{path}: {name} names {file_name!r}, which is not a plain file name")
        files[name] = path.parent / file_name
    missing = sorted({path.name for path in files.values() if not _is_file(path)})
    if missing:
        raise CheckpointError(f"{path}: names files that are missing: {listing(missing)}")
    return files


def _is_file(path: Path) -> bool:
    """Whether a file is there; none is under a name that no file system takes."""
    with contextlib.suppress(OSError):
        return path.is_file()
    return False


def _broken_file(path: Path, error: Exception) -> str:
    if not path.exists():
        return f"{path}: no such file"
    return f"{path}: not a complete safetensors file ({first_line(error)})"
