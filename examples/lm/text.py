"""Text as bytes: the files of a folder, some of them held out whole, and random windows of them.

Only sizes are looked at when a corpus is made. A window's bytes are read when somebody asks for its row, so that each
process of a run reads its own part of a batch only.
"""

from __future__ import annotations

import bisect
import dataclasses
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Folders of a Python installation that are not its library's own sources, or are tables rather than text.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}

# Every file whose path hashes to 0 modulo this is held out.
_HELD_OUT_EVERY = 12

_LEAST_BYTES = 10_000


class Text:
    """The bytes of files one after the other, a line break between two.

    Attributes:
      size: bytes in all.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = list(paths)
        sizes = [path.stat().st_size + 1 for path in self._paths]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).tolist()
        self.size = max(0, self._starts[-1] - 1)

    def read(self, start: int, length: int) -> np.ndarray:
        """uint8 [length]: the bytes from `start` on.

        Raises:
          ValueError: a file has become shorter.
        """
        parts = b""
        number = bisect.bisect_right(self._starts, start) - 1
        while len(parts) < length:
            path, offset = self._paths[number], start + len(parts) - self._starts[number]
            wanted = min(length - len(parts), self._starts[number + 1] - 1 - self._starts[number] - offset)
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                part = file.read(wanted)
            if len(part) != wanted:
                raise ValueError(
                    f"data: expected {wanted} bytes at {offset} of {path}, got {len(part)}; it changed"
                )
            parts += part + b"\n"
            number += 1
        return np.frombuffer(parts[:length], np.uint8)


class Windows:
    """int32 [count, length] pieces of a text, read row by row as they are asked for with NumPy's slices.

    Attributes:
      shape: (count, length).
    """

    def __init__(self, text: Text, starts: np.ndarray, length: int):
        self._text = text
        self._starts = starts
        self.shape = (len(starts), length)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        rows, *rest = index if isinstance(index, tuple) else (index,)
        length = self.shape[1]
        read = [self._text.read(int(start), length) for start in self._starts[rows]]
        return np.asarray(read, np.int32).reshape(-1, length)[:, *rest]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.int32)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text to learn from and text of other files to test on.

    Attributes:
      train: of most files.
      held_out: of the files that are never trained on.
      description: where it came from, for people.
    """

    train: Text
    held_out: Text
    description: str

    def train_batch(self, step: int, seed: int, batch: int, length: int) -> Windows:
        """[batch, length]: random windows, the same for the same step and seed."""
        return _windows(self.train, np.random.default_rng((seed, step)), batch, length)

    def held_out_batches(self, count: int, batch: int, length: int) -> list[Windows]:
        """`count` batches [batch, length] of windows of the held-out files, always the same."""
        rng = np.random.default_rng(0)
        return [_windows(self.held_out, rng, batch, length) for _ in range(count)]


def read_corpus(folder: Path | None = None, pattern: str = "*.py") -> Corpus:
    """The files below `folder` whose names match; None is the running Python's standard library.

    Raises:
      ValueError: too little text there.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    paths = sorted(
        path
        for path in root.rglob(pattern)
        if path.is_file() and (folder is not None or not _SKIPPED & set(path.relative_to(root).parts))
    )
    parts: dict[bool, list[Path]] = {True: [], False: []}
    for path in paths:
        parts[zlib.crc32(path.relative_to(root).as_posix().encode()) % _HELD_OUT_EVERY == 0].append(path)
    train, held_out = Text(parts[False]), Text(parts[True])
    for name, part in (("train on", train), ("hold out", held_out)):
        if part.size < _LEAST_BYTES:
            raise ValueError(
                f"data: expected files {pattern!r} under {root} with at least {_LEAST_BYTES:,} bytes to {name}, got "
                f"{part.size} bytes in {len(paths)} files; give another folder or pattern"
            )
    description = (
        f"{len(paths)} files {pattern} under {root}: {train.size / 1e6:.1f} MB to train on, "
        f"{held_out.size / 1e6:.1f} MB in {len(parts[True])} files held out"
    )
    return Corpus(train, held_out, description)


def as_text(tokens: np.ndarray) -> str:
    """Bytes as text; bytes that are no UTF-8 show as the replacement character."""
    return bytes(np.asarray(tokens, np.uint8)).decode("utf-8", errors="replace")


def _windows(text: Text, rng: np.random.Generator, count: int, length: int) -> Windows:
    if text.size <= length:
        raise ValueError(
            f"seq: expected less than the {text.size} bytes of the text, got {length}; shorten it"
        )
    return Windows(text, rng.integers(0, text.size - length, count), length)
