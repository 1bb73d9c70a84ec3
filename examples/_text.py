"""Text as tokens: files of bytes, or of 16-bit tokens that stay on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastreg.errors import FastregError

DOCS = Path(__file__).resolve().parents[1] / "docs"


def load(path: Path | None, vocab: int, length: int) -> np.ndarray:
    """Tokens ``[N]``: a ``.bin`` file of uint16, or any other file's bytes; None takes this repository's documentation.

    Args:
        path: the file.
        vocab: how many tokens the model knows; up to 256 are bytes.
        length: of what will be cut out.
    """
    binary = path is not None and path.suffix == ".bin"
    if binary == (vocab <= 256):
        wanted = "a text file, whose bytes are the tokens" if vocab <= 256 else "a .bin file of uint16 tokens"
        raise FastregError(f"pretrain: --data must be {wanted}, for a vocabulary of {vocab}, got {path}")
    if binary:
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
    else:
        files = sorted(DOCS.glob("*.md")) if path is None else [path]
        tokens = np.frombuffer(b"\n".join(file.read_bytes() for file in files), dtype=np.uint8)
    if len(tokens) < length:
        raise FastregError(f"pretrain: --data must have at least {length} tokens, got {len(tokens)} (another file)")
    return tokens


def batch(tokens: np.ndarray, size: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[size, context]``, cut out at random; the same for the same seed."""
    starts = torch.randint(len(tokens) - context, (size,), generator=torch.Generator().manual_seed(seed))
    cut = np.stack([tokens[start : start + context + 1] for start in starts.tolist()]).astype(np.int64)
    return torch.from_numpy(cut[:, :-1].copy()), torch.from_numpy(cut[:, 1:].copy())
