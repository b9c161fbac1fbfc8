"""The safetensors format: eight bytes that give the header's length, the header as JSON (dtype, shape and byte range of
every tensor), then the tensors' bytes, row-major and little-endian.

It is read and written here, not by the package of that name, since a process reads some rows of a tensor (of float8
too), several processes write rows of the same tensor, and an error has to name the tensor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own bound


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
      name: its name.
      dtype: its dtype; None for one that this module does not know.
      shape: its shape.
      path: the file.
      begin: offset in the file of its first byte.
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[int, ...]
    path: pathlib.Path
    begin: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis; of the whole tensor if it has no axes."""
        assert self.dtype is not None
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.row_bytes * (self.shape[0] if self.shape else 1)


class Checkpoint:
    """The safetensors of a model: one file, or several with an index. Opening it reads the index only.

    Args:
      path: the folder, the `.safetensors` file, or the `.index.json` file.

    Attributes:
      bytes_read: bytes of tensors read so far by this process.

    Raises:
      FileNotFoundError: there is no such file, or nothing of the kind in the folder.
      ValueError: the index or a header is damaged, or a file is shorter than its header says; the message names the
        file and, where there is one, the tensor. Headers are read when they are first needed.
    """

    def __init__(self, path: str | os.PathLike):
        path = pathlib.Path(path)
        if path.is_dir():
            found = [path / name for name in (INDEX, SINGLE) if (path / name).is_file()]
            if not found:
                raise FileNotFoundError(
                    f"Checkpoint: path: expected {INDEX} or {SINGLE} in {path}, got neither; pass the model's folder "
                    "or one of its files"
                )
            path = found[0]
        elif not path.is_file():
            raise FileNotFoundError(
                f"Checkpoint: path: expected a folder or a file, got {path}, which is neither"
            )
        self.path = path
        self.bytes_read = 0
        self._headers: dict[pathlib.Path, dict[str, Tensor]] = {}
        self._file_of = _read_index(path) if path.suffix == ".json" else None

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._header(self.path) if self._file_of is None else self._file_of)

    def find(self, name: str) -> Tensor | None:
        """Where the tensor of that name lies, or None.

        Raises:
          ValueError: the index names a file that does not hold it, or the file is damaged.
          FileNotFoundError: the index names a file that is not there.
        """
        if self._file_of is None:
            return self._header(self.path).get(name)
        if name not in self._file_of:
            return None
        path = self.path.parent / self._file_of[name]
        if not path.is_file():
            raise FileNotFoundError(
                f"Checkpoint: tensor {name!r}: expected it in {path}, as {self.path.name} says, but there is no such "
                "file; download it"
            )
        tensor = self._header(path).get(name)
        if tensor is None:
            raise ValueError(
                f"Checkpoint: tensor {name!r}: expected it in {path}, as {self.path.name} says, but that file does not "
                "hold it; download both again"
            )
        return tensor

    def read(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of the first axis, or the whole tensor; reads no other bytes."""
        if tensor.dtype is None:
            raise ValueError(
                f"Checkpoint: tensor {tensor.name!r} of {tensor.path}: expected a dtype among {', '.join(_DTYPES)}, "
                "got another; convert it"
            )
        rows = tensor.shape[0] if tensor.shape else 1
        stop = rows if stop is None else stop
        wanted = (stop - start) * tensor.row_bytes
        with open(tensor.path, "rb") as file:
            file.seek(tensor.begin + start * tensor.row_bytes)
            data = np.fromfile(file, np.uint8, wanted)
        if data.size != wanted:
            raise _truncated(tensor, tensor.path.stat().st_size)
        self.bytes_read += wanted
        shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
        return data.view(tensor.dtype).reshape(shape)

    def _header(self, path: pathlib.Path) -> dict[str, Tensor]:
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
      ValueError: the header is no safetensors header, or the file ends before a tensor does.
    """
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < header_bytes <= min(_LONGEST_HEADER, file_bytes - 8):
            raise ValueError(
                f"Checkpoint: {path}: expected a safetensors file, got {file_bytes} bytes that do not hold a header; "
                "download it again"
            )
        text = file.read(header_bytes)
    tensors = {}
    try:
        entries = json.loads(text)
        for name, entry in entries.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensor = Tensor(
                    name,
                    np.dtype(_DTYPES[entry["dtype"]]) if entry["dtype"] in _DTYPES else None,
                    tuple(int(size) for size in entry["shape"]),
                    path,
                    8 + header_bytes + int(begin),
                )
                tensors[name] = tensor, 8 + header_bytes + int(end)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Checkpoint: {path}: expected a safetensors header, got an unreadable one ({error}); download it again"
        ) from error
    for tensor, end in tensors.values():
        if tensor.begin < 8 + header_bytes or min(tensor.shape, default=0) < 0:
            raise ValueError(
                f"Checkpoint: tensor {tensor.name!r} of {path}: expected bytes after the header and a shape, got "
                f"{tensor.begin} and {list(tensor.shape)}; download the file again"
            )
        if end > file_bytes:
            raise _truncated(tensor, file_bytes)
        if tensor.dtype is not None and end - tensor.begin != tensor.nbytes:
            raise ValueError(
                f"Checkpoint: tensor {tensor.name!r} of {path}: expected {tensor.nbytes} bytes for "
                f"{_NAMES[tensor.dtype]}{list(tensor.shape)}, got {end - tensor.begin}; download the file again"
            )
    return {name: tensor for name, (tensor, _) in tensors.items()}


def _truncated(tensor: Tensor, file_bytes: int) -> ValueError:
    return ValueError(
        f"Checkpoint: tensor {tensor.name!r} of {tensor.path}: expected its bytes from {tensor.begin} on, got a file "
        f"truncated after {file_bytes}; download it again"
    )


def _read_index(path: pathlib.Path) -> dict[str, str]:
    try:
        file_of = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Checkpoint: {path}: expected an index with a weight_map, got one that cannot be read ({error}); "
            "download it again"
        ) from error
    for name, file in file_of.items():
        # An index is not trusted with paths out of its folder.
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise ValueError(f"Checkpoint: tensor {name!r} of {path}: expected a file's name, got {file!r}")
    return file_of


# ---- writing ----


@dataclasses.dataclass(frozen=True)
class Layout:
    """Files to be written: where each tensor will lie, each file's header, and the index or None."""

    tensors: dict[str, Tensor]
    headers: dict[pathlib.Path, bytes]
    sizes: dict[pathlib.Path, int]
    index: str | None


def lay_out(
    folder: pathlib.Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], max_file_bytes: int
) -> Layout:
    """Divides tensors over files of at most `max_file_bytes`, in the order given; one larger than that has its own."""
    files: list[list[str]] = [[]]
    room = max_file_bytes
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if files[-1] and nbytes > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(name)
        room -= nbytes
    layout = Layout({}, {}, {}, None)
    for number, names in enumerate(files):
        several = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        path = folder / (SINGLE if len(files) == 1 else several)
        # Wider dtypes first, so that every tensor is aligned.
        names = sorted(names, key=lambda name: -tensors[name][0].itemsize)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            dtype, shape = tensors[name]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        layout.headers[path] = header
        layout.sizes[path] = len(header) + end
        for name in names:
            dtype, shape = tensors[name]
            layout.tensors[name] = Tensor(
                name, dtype, shape, path, len(header) + entries[name]["data_offsets"][0]
            )
    if len(files) == 1:
        return layout
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: layout.tensors[name].path.name for name in sorted(tensors)},
    }
    return dataclasses.replace(layout, index=json.dumps(index, indent=2) + "\n")


def write_rows(tensor: Tensor, path: pathlib.Path, start: int, rows: np.ndarray) -> None:
    """Writes rows from index `start` of the first axis on into `path`, which stands for the tensor's file."""
    assert rows.dtype == tensor.dtype and rows.shape[1:] == tensor.shape[1:], tensor
    with open(path, "r+b") as file:
        file.seek(tensor.begin + start * tensor.row_bytes)
        np.ascontiguousarray(rows).view(np.uint8).tofile(file)
