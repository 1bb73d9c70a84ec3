"""What every batch sampler shares: epochs, shares of ranks, and a state to resume from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from fastreg.errors import FastregError

Partition = Literal["redrawn", "fixed"]


@dataclass(eq=False)
class EpochSampler(Sampler[list[int]], ABC):
    """Batches of ``batch_size`` of the indices 0 .. size - 1, for ``DataLoader(dataset, batch_sampler=...)``.

    Every ``iter()`` begins the next epoch, a function of (seed, epoch) alone; torch's generators are neither read nor
    moved. ``set_epoch(n)`` says which epoch is next, as torch's DistributedSampler does, and need not be called.
    An epoch takes memory for one index per sample and one number per step.

    Ranks: every rank builds the sampler with the same arguments but ``rank``, and gets a contiguous share of each
    global batch. Shares are disjoint, cover the batch and differ by at most one sample. DistributedDataParallel takes
    the plain mean over ranks, which is the mean over the batch only if shares are equal: take ``batch_size`` a multiple
    of ``world_size``. Where it is one of ``world_size * micro_batch_size``, the micro-batches of the ranks, in their
    order, are those of the global batch on one rank.

    Resuming: workers of a DataLoader fetch ahead of the loop, so tell ``state_dict`` what the loop has consumed::

        for k, batch in enumerate(loader, 1):
            step(batch)
            state = sampler.state_dict(consumed=k)

    The next ``iter()`` after ``load_state_dict(state)`` is the rest of that epoch, bit for bit; it is empty if the loop
    had consumed the last batch. ``len()`` stays that of a whole epoch. A state serves all ranks, and any number of
    them. There is one position: iterate one loader at a time.

    Subclasses say how samples are laid out in batches (``_samples``) and which batch each step takes (``_order``).

    Args:
        size: N, samples in the data set.
        batch_size: B, samples per global batch, from 1 to N.
        seed: of all draws, >= 0.
        drop_last: leave out the last, short batch of a partition. A fixed partition leaves out the same samples in
            every epoch.
        rank: of this process, from 0 to world_size - 1.
        world_size: number of ranks; no batch may have fewer samples.

    Raises:
        FastregError: an argument is out of its range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from fastreg.sampling import Shuffled
        >>> sampler = Shuffled(6, 2)
        >>> first, second, third = DataLoader(range(6), batch_sampler=sampler)
        >>> resumed = Shuffled(6, 2)
        >>> resumed.load_state_dict(sampler.state_dict(consumed=2))
        >>> [batch.tolist() for batch in DataLoader(range(6), batch_sampler=resumed)] == [third.tolist()]
        True
    """

    size: int
    batch_size: int
    seed: int = field(default=0, kw_only=True)
    drop_last: bool = field(default=False, kw_only=True)
    # No part of a sampler's identity (its repr), so that a state can be loaded by another number of ranks.
    rank: int = field(default=0, kw_only=True, repr=False)
    world_size: int = field(default=1, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        self._check_integer("size", self.size, 1)
        self._check_integer("batch_size", self.batch_size, 1, self.size, "at most the number of samples")
        self._check_integer("seed", self.seed, 0)
        self._check_choice("drop_last", self.drop_last, (False, True))
        self._check_integer("world_size", self.world_size, 1, self._shortest, "every rank needs a share of each batch")
        self._check_integer("rank", self.rank, 0, self.world_size - 1)
        self._move(0, 0)

    def __len__(self) -> int:
        return self._parts

    def __iter__(self) -> Iterator[list[int]]:
        # Runs at the first next(), not at iter(): a DataLoader with workers calls iter() twice per epoch.
        if self._begun:
            self._move(self.epoch + 1, 0)
        self._begun: bool = True
        for batch in self.of_epoch(self.epoch, self._start):
            self._handed += 1
            yield batch
        self._ended = True

    def of_epoch(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """This rank's batches of an epoch, without the first ``start``; it neither reads nor moves the position."""
        self._check_integer("epoch", epoch, 0)
        samples, order = self._samples(epoch), self._order(epoch)
        return (self._share(samples, part) for part in order[start:].tolist())

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter()`` be ``epoch``: from its beginning, or from where a loaded state left that epoch."""
        self._check_integer("epoch", epoch, 0)
        self._move(epoch, 0 if self._begun or epoch != self.epoch else self._start)

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Where to resume.

        Args:
            consumed: batches that the loop has had since the last ``iter()``; by default all that were handed out and,
                once the iteration has ended, the epoch itself. The default is right without workers, and for
                torchdata's StatefulDataLoader, which asks at each batch.

        Returns:
            The epoch, its batches consumed so far, and the sampler they belong to: integers and a string.

        Raises:
            FastregError: more batches consumed than handed out.
        """
        if consumed is None and self._ended:
            return {"epoch": self.epoch + 1, "batches": 0, "sampler": repr(self)}
        if consumed is None:
            consumed = self._handed
        self._check_integer("consumed", consumed, 0, self._handed, "batches handed out since the last iter()")
        return {"epoch": self.epoch, "batches": self._start + consumed, "sampler": repr(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next ``iter()`` be the rest of the epoch that ``state_dict`` was taken in.

        Raises:
            FastregError: the state is no position of this sampler.
        """
        if state_dict.get("sampler") != repr(self):
            raise FastregError(
                f"{type(self).__name__}: state_dict must be of {self!r}, got that of {state_dict.get('sampler')} "
                "(build the sampler with the arguments it was saved with)"
            )
        self._check_integer("state_dict['epoch']", state_dict["epoch"], 0)
        self._check_integer("state_dict['batches']", state_dict["batches"], 0, len(self))
        self._move(state_dict["epoch"], state_dict["batches"])

    def _move(self, epoch: int, start: int) -> None:
        """Let the next ``iter()`` begin at batch ``start`` of ``epoch``."""
        self.epoch, self._start, self._handed = epoch, start, 0
        self._begun = self._ended = False

    @abstractmethod
    def _samples(self, epoch: int) -> np.ndarray:
        """Indices of samples, batch after batch."""

    @abstractmethod
    def _order(self, epoch: int) -> np.ndarray:
        """The batch that each step takes, ``[len(self)]``."""

    @property
    def _parts(self) -> int:
        """Batches of a partition."""
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    @property
    def _shortest(self) -> int:
        """Samples of the shortest batch."""
        return min(self.batch_size, self.size - (self._parts - 1) * self.batch_size)

    def _share(self, samples: np.ndarray, part: int) -> list[int]:
        batch = samples[part * self.batch_size : (part + 1) * self.batch_size]
        first, last = (len(batch) * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return batch[first:last].tolist()

    def _fixed(self) -> np.ndarray:
        """The fixed partition, ``[size]``."""
        return self._random().permutation(self.size)

    def _random(self, *epoch: int) -> np.random.Generator:
        """Random numbers of an epoch, or without one those of all epochs."""
        # Not seed + epoch, under which runs of neighbouring seeds share their epochs.
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(len(epoch), *epoch)))

    def _check_integer(self, name: str, value: object, least: int, most: int | None = None, why: str = "") -> None:
        highest = math.inf if most is None else most
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= highest:
            expected = f">= {least}" if most is None else f"from {least} to {most}"
            hint = f" ({why})" if why else ""
            raise FastregError(f"{type(self).__name__}: {name} must be an integer {expected}, got {value!r}{hint}")

    def _check_choice(self, name: str, value: object, choices: tuple[Any, ...]) -> None:
        if value not in choices:
            raise FastregError(f"{type(self).__name__}: {name} must be one of {choices}, got {value!r}")
