"""Ways in which a safetensors file can be wrong: its header as bytes, and its tensors in a file that is whole."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.jsons import NUMBERS, STRANGE_NAMES, nested, strange

__all__ = ["mutate_header", "mutate_tensors"]

CODES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64",
    "f32", "", None, 5, "U128",
)  # fmt: skip
CASTS = (
    torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32,
    torch.int8, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
VALUES = (float("nan"), float("inf"), float("-inf"), 0.0, 1.0, 3e38, 1e30, 1e-30, 1e-45, 0.3)


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """A file's header, and the bytes after it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: Any, body: bytes, length: int | None = None) -> None:
    """Write a file from a header, as JSON or bytes, and the bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def _entry(header: dict[str, Any], rng: random.Random) -> tuple[str, dict[str, Any]]:
    name = rng.choice([name for name in header if name != "__metadata__"])
    return name, header[name]


@contextlib.contextmanager
def _edited(path: Path, rng: random.Random) -> Iterator[tuple[dict[str, Any], bytes, str, dict[str, Any]]]:
    """A file's header, the bytes after it, and the name and entry of one of its tensors, written back at the end."""
    header, body = split(path)
    yield header, body, *_entry(header, rng)
    join(path, header, body)


def _dtype(path: Path, rng: random.Random) -> str:
    with _edited(path, rng) as (_, _, name, entry):
        entry["dtype"] = rng.choice(CODES)
    return f"{name} has dtype {entry['dtype']!r}"


def _shape(path: Path, rng: random.Random) -> str:
    with _edited(path, rng) as (_, _, name, entry):
        old = entry["shape"]
        entry["shape"] = rng.choice(
            (
                [], [0], [-1], old[::-1], [*old, 1], [1, *old], [2**62, 4], [2**32, 2**32], [1e308], "x", None, [True],
                [1.5], [*old[:-1], 0], [sum(old)], nested(3), [1] * 70, [2**63], [rng.choice(NUMBERS)],
            )
        )  # fmt: skip
    return f"{name} has shape {entry['shape']!r:.60}"


def _offsets(path: Path, rng: random.Random) -> str:
    with _edited(path, rng) as (header, body, name, entry):
        begin, end = entry["data_offsets"]
        other = header[_entry(header, rng)[0]]["data_offsets"]
        entry["data_offsets"] = rng.choice(
            (
                [end, begin], [begin + 4, end + 4], [begin, end + 4], [begin, end - 4], other, [0, 2**63], [-4, end],
                [begin], [], None, "x", [0, len(body)], [begin, begin], [2**64, 2**64 + 4], [begin + 1, end + 1],
            )
        )  # fmt: skip
    return f"{name} has offsets {entry['data_offsets']!r}"


def _field(path: Path, rng: random.Random) -> str:
    with _edited(path, rng) as (_, _, name, entry):
        key = rng.choice(("dtype", "shape", "data_offsets", "more"))
        if rng.random() < 0.5:
            entry.pop(key, None)
            done = f"{name} without {key}"
        else:
            entry[key] = strange(rng)
            done = f"{name} has {key} {entry[key]!r:.60}"
    return done


def _name(path: Path, rng: random.Random) -> str:
    header, body = split(path)
    name, entry = _entry(header, rng)
    new = rng.choice(STRANGE_NAMES)
    del header[name]
    header[new] = entry
    join(path, header, body)
    return f"{name} is called {new!r:.60}"


def _twice(path: Path, rng: random.Random) -> str:
    header, body = split(path)
    name, entry = _entry(header, rng)
    text = json.dumps(header)
    join(path, f"{text[:-1]}, {json.dumps({name: entry})[1:-1]}}}".encode(), body)
    return f"{name} is there twice"


def _metadata(path: Path, rng: random.Random) -> str:
    header, body = split(path)
    header["__metadata__"] = rng.choice((strange(rng), {"format": strange(rng)}, {rng.choice(STRANGE_NAMES): "x"}))
    join(path, header, body)
    return f"metadata is {header['__metadata__']!r:.60}"


def _length(path: Path, rng: random.Random) -> str:
    header, body = split(path)
    text = json.dumps(header).encode()
    length = rng.choice((0, 1, len(text) - 1, len(text) + 1, len(text) + 10**6, 2**32, 2**63, 2**64 - 1, 100_000_001))
    join(path, text, body, length)
    return f"header length {length}"


def _garbage(path: Path, rng: random.Random) -> str:
    header, body = split(path)
    text = json.dumps(header)
    garbage = rng.choice(
        (
            b"{" * 100_000, b"[" * 100_000, b'{"a":' * 50_000, b"null", b"[]", b"{}", b"5", b'"x"', b"\xff\xfe{}",
            text.encode("utf-16"), text.encode() + b"\x00" * 8, b"\xef\xbb\xbf" + text.encode(), b" " + text.encode(),
            text.replace('"F32"', "NaN").encode(), text[: len(text) // 2].encode(), (text + text).encode(),
        )
    )  # fmt: skip
    join(path, garbage, body)
    return f"header is {garbage[:40]!r}"


def _body(path: Path, rng: random.Random) -> str:
    header, body = split(path)
    kind = rng.choice(("cut", "longer", "flipped", "none"))
    if kind == "cut":
        body = body[: rng.randrange(len(body))] if body else body
    elif kind == "longer":
        body += bytes(rng.choice((1, 4, 4096)))
    elif kind == "none":
        body = b""
    else:
        flipped = bytearray(body)
        for _ in range(rng.choice((1, 1, 8, 100))):
            if flipped:
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        body = bytes(flipped)
    join(path, header, body)
    return f"body {kind}"


HEADER_EDITS: tuple[Callable[[Path, random.Random], str], ...] = (
    _dtype, _shape, _offsets, _field, _name, _twice, _metadata, _length, _garbage, _body, _body,
)  # fmt: skip


def mutate_header(path: Path, rng: random.Random) -> str:
    """Change the bytes of a file, mostly so that it is no safetensors file any more; what was done."""
    return f"{path.name}: {rng.choice(HEADER_EDITS)(path, rng)}"


def _reshaped(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    choices = [tensor.flatten(), tensor[None], tensor[..., None], tensor[:0], tensor[:1], tensor.new_zeros(())]
    if tensor.ndim == 2:
        choices += [tensor.T, tensor[:, :0], tensor[:, :1], tensor[:-1], tensor[:, :-1], tensor.repeat(2, 1)]
        choices += [tensor.repeat(1, 2), tensor.diagonal()]
    return rng.choice(choices).contiguous()


def _filled(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    filled = tensor.clone()
    if not filled.is_floating_point():
        return (filled * rng.choice((0, -1, 3))).clone()
    value = rng.choice(VALUES)
    if rng.random() < 0.5 or not filled.numel():
        return torch.full_like(filled, value)
    filled.view(-1)[rng.randrange(filled.numel())] = value
    return filled


def mutate_tensors(path: Path, rng: random.Random) -> str:
    """Change one tensor of a file, which stays a safetensors file; what was done."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = rng.choice(sorted(tensors))
    kind = rng.choice(("shape", "shape", "dtype", "values", "values", "name", "gone", "copy", "swap", "all gone"))
    other = rng.choice((*STRANGE_NAMES[3:15], f"{name}.weight", name.rpartition(".")[0] or "x", f"x{name}"))
    if "\ud800" in other:
        other = "surrogate"
    detail = ""
    if kind == "shape":
        tensors[name] = _reshaped(tensors[name], rng)
        detail = str(tuple(tensors[name].shape))
    elif kind == "dtype":
        dtype = rng.choice(CASTS)
        tensors[name] = tensors[name].to(dtype)
        detail = str(dtype)
    elif kind == "values":
        tensors[name] = _filled(tensors[name], rng)
        detail = str(tensors[name].reshape(-1)[:1].tolist())
    elif kind == "name":
        tensors[other] = tensors.pop(name)
        detail = repr(other)[:60]
    elif kind == "gone":
        del tensors[name]
    elif kind == "copy":
        tensors[other] = tensors[name].clone()
        detail = repr(other)[:60]
    elif kind == "swap":
        second = rng.choice(sorted(tensors))
        tensors[name], tensors[second] = tensors[second].clone(), tensors[name].clone()
        detail = second
    else:
        tensors.clear()
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{path.name}: {name}: {kind} {detail}".rstrip()
