"""Writing a safetensors file one tensor at a time, from the header of another: memory is that of one tensor.

The format: the length of the header in 8 bytes, the header (JSON: dtype, shape and place of every tensor), the bytes of
the tensors one after another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from surgery.errors import CheckpointError, OutputError
from surgery.storage.safetensors_read import DTYPE_CODES, file_order, tensor_names
from surgery.system.tensors import planned

__all__ = [
    "DTYPE_OF_CODE",
    "Header",
    "Tensor",
    "read_digests",
    "read_header",
    "stored_pieces",
    "tensor_bytes",
    "verify_file",
    "write_file",
    "write_tensors",
]

DTYPE_OF_CODE = {code: dtype for dtype, code in DTYPE_CODES.items()}
CHUNK = 1 << 24


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        dtype: as the format calls it, `BF16`.
        shape: its shape.
        size: its bytes.
        start: where they begin in the file; None for one that is still to be written.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    start: int | None = None

    @classmethod
    def like(cls, tensor: torch.Tensor) -> Tensor:
        """The entry of a tensor in memory."""
        return cls(DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)

    def cast(self, dtype: torch.dtype) -> Tensor:
        """The entry of this tensor in another dtype."""
        return Tensor(DTYPE_CODES[dtype], self.shape, math.prod(self.shape) * dtype.itemsize)


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its tensors in the order of the file, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and nothing else.

    Raises:
        CheckpointError: the file is missing, truncated, or not a safetensors file.
    """
    tensor_names(path)  # the format's own library judges whether header and file fit together
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    metadata = entries.pop("__metadata__", {})
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
        begin, end = entry["data_offsets"]
        tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), end - begin, 8 + length + begin)
    return Header(tensors, metadata)


def write_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    content: Callable[[str], Iterator[Any]],
) -> dict[str, str]:
    """Write a safetensors file.

    Args:
        path: where to.
        tensors: what it will hold. Wide dtypes come first in the file, so that every tensor is aligned.
        metadata: of the header.
        content: gives the bytes of a tensor, in pieces; called once for each, in the order of the file.

    Returns:
        A digest of every tensor: of its dtype, its shape and its bytes.

    Raises:
        OutputError: a tensor has another number of bytes than its entry says.
    """
    order = sorted(tensors, key=lambda name: -_item_size(tensors[name]))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        entry = tensors[name]
        entries[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.size],
        }
        position += entry.size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    digests = {}
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            digest, written = _digest_of(tensors[name]), 0
            for piece in content(name):
                digest.update(piece)
                written += file.write(piece)
            if written != tensors[name].size:
                raise OutputError(f"{path.name}: {name} has {written} bytes, expected {tensors[name].size}")
            digests[name] = digest.hexdigest()
    return digests


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Write the file that safetensors' library would write, one tensor at a time, and no other file beside it.

    Tensors may share memory, or lie in it in any order. Those that are made when asked for are made once.

    Returns:
        A digest of every tensor, as from `write_file`.
    """
    shapes = planned(tensors)
    order = file_order({name: tensor.dtype for name, tensor in shapes.items()})
    entries = {name: Tensor.like(shapes[name]) for name in order}
    return write_file(path, entries, metadata, lambda name: tensor_bytes(tensors[name]))


def stored_pieces(path: Path, tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor as they are in a file, in pieces."""
    assert tensor.start is not None
    with path.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.size
        while left:
            piece = file.read(min(left, CHUNK))
            if not piece:
                raise CheckpointError(f"{path}: ends before its tensors do")
            left -= len(piece)
            yield piece


def tensor_bytes(tensor: torch.Tensor) -> Iterator[Any]:
    """The bytes of a tensor in memory, in one piece."""
    yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def read_digests(path: Path) -> dict[str, str]:
    """A digest of every tensor of a file, as from `write_file`, read from the disk.

    Raises:
        CheckpointError: the file is broken.
    """
    digests = {}
    for name, tensor in read_header(path).tensors.items():
        digest = _digest_of(tensor)
        for piece in stored_pieces(path, tensor):
            digest.update(piece)
        digests[name] = digest.hexdigest()
    return digests


def verify_file(path: Path, digests: Mapping[str, str], target: str) -> None:
    """Read a file back and compare it with what was written.

    Args:
        path: the file.
        digests: of every tensor, as from `write_file`.
        target: what an error calls the output.

    Raises:
        OutputError: a tensor differs, is missing, or is one too many.
        CheckpointError: the file is broken.
    """
    found = read_digests(path)
    wrong = next((name for name in {**digests, **found} if found.get(name) != digests.get(name)), None)
    if wrong is not None:
        raise OutputError(f"{target}: tensor {wrong} read back differs from what was written")


def _digest_of(tensor: Tensor) -> xxhash.xxh3_128:
    """The beginning of a tensor's digest."""
    return xxhash.xxh3_128(f"{tensor.dtype} {tensor.shape} ".encode())


def _item_size(tensor: Tensor) -> int:
    known = DTYPE_OF_CODE.get(tensor.dtype)
    return known.itemsize if known is not None else tensor.size // max(math.prod(tensor.shape), 1)
