"""The folder of a merged model: its weight files, and the copies of all other files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.companions import copy_companions, replaced_by
from surgery.errors import CheckpointError, OutputError, SurgeryError, listing
from surgery.merging.plan import MergePlan
from surgery.models.base_model import BaseModel
from surgery.storage.folder_checks import check_link
from surgery.storage.json_files import read_json, write_json
from surgery.storage.resume import Parts
from surgery.storage.safetensors_read import SINGLE_FILE
from surgery.storage.safetensors_write import (
    DTYPE_OF_CODE,
    Header,
    Tensor,
    read_digests,
    read_header,
    stored_pieces,
    tensor_bytes,
    verify_file,
    write_file,
)
from surgery.system.memory import release_freed
from surgery.system.progress import Progress
from surgery.system.text import human_bytes

__all__ = ["MergedFolder"]

INDEX_FILE = "model.safetensors.index.json"
PROVENANCE_FILE = "surgery.json"
FLOATS = {"F64", "F32", "F16", "BF16"}
# Weights, in other formats than the one that is written: of the base, not of the result, or able to run code.
OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ggml",
    ".tflite",
    ".mlmodel",
    ".index.json",
)


class MergedFolder:
    """What a merge writes.

    Args:
        plan: what changes.
        dtype: of the floating-point tensors; None keeps each tensor's own.

    Attributes:
        weight_files: names of the safetensors files, those of the base.
        bytes: of all tensors.
        parameters: numbers in all tensors.
        dtypes: bytes by dtype.
        copied: other files, relative to the base's folder.
        companions: files from the adapter's folder, which replace the base's of their kind.
        left_out: files that are not copied.
        notes: what the user should know.
    """

    def __init__(self, plan: MergePlan, dtype: torch.dtype | None) -> None:
        self.plan, self.dtype = plan, dtype
        base = plan.base
        self.weight_files = sorted({path.name for path in base.files.files.values()})
        self._sources = {name: read_header(base.folder / name) for name in self.weight_files}
        self._tensors = {name: self._planned(header) for name, header in self._sources.items()}
        self._tensors[self.weight_files[-1]].update(self._added())
        every = [tensor for tensors in self._tensors.values() for tensor in tensors.values()]
        self.bytes = sum(tensor.size for tensor in every)
        self.parameters = sum(_count(tensor) for tensor in every)
        self.dtypes: dict[str, int] = {}
        for tensor in every:
            name = (
                str(DTYPE_OF_CODE[tensor.dtype]).removeprefix("torch.")
                if tensor.dtype in DTYPE_OF_CODE
                else tensor.dtype
            )
            self.dtypes[name] = self.dtypes.get(name, 0) + tensor.size
        self.copied, self.left_out = _other_files(base.folder, set(self.weight_files))
        self.companions = plan.adapter.companions
        replaced = replaced_by(self.companions, self.copied)
        self.copied = [name for name in self.copied if name not in replaced]
        self.notes = [f"not copied, weights in another form: {listing(self.left_out, 3)}"] if self.left_out else []
        if self.companions:
            self.notes.append(_companions_note(self.companions, replaced))
        self._digests: dict[str, dict[str, str]] = {}

    def check_space(self, out: Path) -> None:
        """Check that the disk has room for the result.

        Raises:
            OutputError: it has not.
        """
        parent = next(folder for folder in out.absolute().parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if free < self.bytes:
            raise OutputError(f"{out}: needs {human_bytes(self.bytes)}, the disk has {human_bytes(free)} left")

    def write(self, folder: Path, provenance: dict[str, Any], parts: Parts, progress: Progress | None) -> int:
        """Write everything; returns the bytes of the safetensors files.

        Args:
            folder: where to.
            provenance: what goes into `surgery.json`.
            parts: what is to be known of the weight files that are finished. Those that a run before this one has
                finished are read, and stay if they are whole.
            progress: called before each tensor that is written.
        """
        for name in self.copied:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.plan.base.folder / name, folder / name)
        copy_companions(self.companions, folder)
        config = self._config()
        if config is not None:
            write_json(folder / "config.json", config)
        index = self.plan.base.folder / INDEX_FILE
        if index.is_file() and self.weight_files != [SINGLE_FILE]:  # a stale one is not copied
            write_json(folder / INDEX_FILE, self._index(read_json(index)))
        write_json(folder / PROVENANCE_FILE, provenance)
        total, done = sum(len(tensors) for tensors in self._tensors.values()), 0
        for name, tensors in self._tensors.items():
            if self._is_finished(folder / name, parts):
                self._digests[name] = parts.facts(name)["digests"]
                self.plan.take(parts.facts(name)["figures"])
                done += len(tensors)
                continue

            def told(tensor: str, file: str = name) -> Iterator[Any]:
                nonlocal done
                done += 1
                if progress is not None:
                    progress(done, total, file)
                return self._content(file, tensor)

            metadata = {"format": "pt", **self._sources[name].metadata}
            self._digests[name] = write_file(folder / name, tensors, metadata, told)
            parts.add(name, {}, {"digests": self._digests[name], "figures": self.plan.taken_figures()})
        self.plan.base.files.check_unchanged()
        return sum((folder / name).stat().st_size for name in self.weight_files)

    def _is_finished(self, path: Path, parts: Parts) -> bool:
        """Whether a run before this one has written a weight file, and it is still what was written."""
        if path.name not in parts or not path.is_file():
            return False
        with contextlib.suppress(CheckpointError):
            return read_digests(path) == parts.facts(path.name)["digests"]
        return False

    def verify(self, folder: Path, target: str, trust_remote_code: bool) -> None:
        """Read back what was written, all of it, and open it as a model.

        Raises:
            OutputError: it is not what was meant.
        """
        try:
            for name in self.weight_files:
                verify_file(folder / name, self._digests[name], target)
            made = self.plan.target
            task = made.task.name if made.task is not None and made.is_text_part else None
            self._verify_names(BaseModel.open(folder, task, trust_remote_code))
        except OutputError:
            raise
        except SurgeryError as error:
            raise OutputError(f"{target}: what was written cannot be opened ({error})") from None

    def _verify_names(self, written: BaseModel) -> None:
        # By name: code that comes with a model is imported anew from each folder.
        if (
            type(written.model).__name__ != type(self.plan.target.model).__name__
            or written.shapes != self.plan.target.shapes
        ):
            raise CheckpointError("it opens as another model")
        before = self.plan.base.sources
        for parameter in written.shapes:
            own = [(parameter, parameter)] if parameter in self.plan.added else None
            expected = own or (before[parameter].keys if parameter in before else None)
            found = written.sources[parameter].keys if parameter in written.sources else None
            if found != expected:
                raise CheckpointError(f"{parameter} is read from another tensor")

    def _planned(self, header: Header) -> dict[str, Tensor]:
        reshaped = self.plan.reshaped
        return {name: self._as_written(tensor, reshaped.get(name)) for name, tensor in header.tensors.items()}

    def _as_written(self, tensor: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        cast = self.dtype is not None and tensor.dtype in FLOATS
        dtype = self.dtype if cast else DTYPE_OF_CODE.get(tensor.dtype)
        if dtype is None or not (cast or shape):
            return tensor
        return replace(tensor, shape=shape or tensor.shape).cast(dtype)

    def _added(self) -> dict[str, Tensor]:
        """Entries of the parameters that have no tensor in the base's files, in the dtype of most of it."""
        sizes: dict[str, int] = {}
        for tensor in (t for header in self._sources.values() for t in header.tensors.values() if t.dtype in FLOATS):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
        main = self.dtype or DTYPE_OF_CODE[max(sizes, key=lambda name: sizes[name])]
        return {name: Tensor("F32", self.plan.shape_of(name), 0).cast(main) for name in self.plan.added}

    def _content(self, file: str, name: str) -> Iterator[Any]:
        planned, source = self._tensors[file][name], self._sources[file].tensors.get(name)
        path = self.plan.base.folder / file
        if name in self.plan.edited or source is None:
            release_freed()
            return tensor_bytes(self.plan.value(name, DTYPE_OF_CODE[planned.dtype]))
        if planned.dtype == source.dtype:
            self.plan.base.files.check_unchanged(path)
            return stored_pieces(path, source)
        return tensor_bytes(_finite(name, self.plan.base.files.read(name), DTYPE_OF_CODE[planned.dtype]))

    def _config(self) -> dict[str, Any] | None:
        """`config.json`, where it changes."""
        config = self.plan.config
        if self.dtype is None:
            return config
        config = dict(config if config is not None else read_json(self.plan.base.folder / "config.json"))
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if part is config or "dtype" in part or "torch_dtype" in part:
                part.pop("torch_dtype", None)
                part["dtype"] = str(self.dtype).removeprefix("torch.")
        return config

    def _index(self, index: dict[str, Any]) -> dict[str, Any]:
        files = {name: file for file, tensors in self._tensors.items() for name in tensors}
        told = index.get("metadata")
        metadata = {**(told if isinstance(told, dict) else {}), "total_size": self.bytes}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = self.parameters
        return {**index, "metadata": metadata, "weight_map": dict(sorted(files.items()))}


def _companions_note(companions: Mapping[str, Path], replaced: Sequence[str]) -> str:
    """What of the result's files is the adapter's, and what of the base's they replace."""
    note = f"from the adapter's folder: {listing(companions, 3)}"
    return f"{note}, in place of the base's {listing(replaced, 3)}" if replaced else note


def _finite(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = tensor.to(dtype)
    if not bool(torch.isfinite(cast).all()) and bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name}: its values are not finite in {dtype}; use --dtype bfloat16 or float32")
    return cast


def _other_files(folder: Path, weights: set[str]) -> tuple[list[str], list[str]]:
    """Files that are copied and files that are not, relative to the folder; hidden ones are passed over.

    Raises:
        CheckpointError: a file that would be copied is a link to one that is not in the folder.
    """
    copied: list[str] = []
    left_out: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(parent).relative_to(folder)
        for name in sorted(names):
            path = inside / name
            if inside == Path() and name.startswith("adapter_"):  # of an adapter that lies in the base's folder
                continue
            if name.startswith(".") or not (Path(parent) / name).is_file() or str(path) in {INDEX_FILE, *weights}:
                continue
            if name.lower().endswith(OTHER_WEIGHTS):
                left_out.append(str(path))
                continue
            check_link(Path(parent) / name, folder)
            copied.append(str(path))
    return copied, left_out


def _count(tensor: Tensor) -> int:
    count = 1
    for length in tensor.shape:
        count *= length
    return count
