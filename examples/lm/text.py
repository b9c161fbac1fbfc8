"""Text as bytes: the files of a folder, some of them held out whole, and random windows of them."""

from __future__ import annotations

import dataclasses
import sysconfig
import zlib
from pathlib import Path

import numpy as np

# Folders of a Python installation that are not its library's own sources, or are tables rather than text.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}

# Every file whose path hashes to 0 modulo this is held out.
_HELD_OUT_EVERY = 12


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes to learn from and bytes of other files to test on.

    Attributes:
      train: uint8 [bytes], files one after the other.
      held_out: the same of the files that are never trained on.
      description: where it came from, for people.
    """

    train: np.ndarray
    held_out: np.ndarray
    description: str

    def train_batch(self, step: int, seed: int, batch: int, length: int) -> np.ndarray:
        """int32 [batch, length]: random windows, the same for the same step and seed."""
        return _windows(self.train, np.random.default_rng((seed, step)), batch, length)

    def held_out_batches(self, count: int, batch: int, length: int) -> np.ndarray:
        """int32 [count, batch, length]: windows of the held-out files, always the same."""
        windows = _windows(self.held_out, np.random.default_rng(0), count * batch, length)
        return windows.reshape(count, batch, length)


def read_corpus(folder: Path | None = None, pattern: str = "*.py") -> Corpus:
    """Reads the files below `folder` whose names match; None is the running Python's standard library.

    Raises:
      ValueError: too little text there.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    paths = sorted(
        path
        for path in root.rglob(pattern)
        if path.is_file() and (folder is not None or not _SKIPPED & set(path.relative_to(root).parts))
    )
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in paths:
        held_out = zlib.crc32(path.relative_to(root).as_posix().encode()) % _HELD_OUT_EVERY == 0
        parts[held_out].append(path.read_bytes())
    train, held_out = (np.frombuffer(b"\n".join(parts[key]), np.uint8) for key in (False, True))
    for name, part in (("train on", train), ("hold out", held_out)):
        if part.size < 10_000:
            raise ValueError(
                f"data: expected files {pattern!r} under {root} with at least 10,000 bytes to {name}, got "
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


def _windows(text: np.ndarray, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    if text.size <= length:
        raise ValueError(
            f"seq: expected less than the {text.size} bytes of the text, got {length}; shorten it"
        )
    starts = rng.integers(0, text.size - length, count)
    return text[starts[:, None] + np.arange(length)].astype(np.int32)
