r"""Short micro-batches of a convolution, without storing any weight gradient and without unfolding any patch.

A convolution pairs a *big* image ``u`` (its input) with a *small* one ``v`` (its output): ``G = sum_o v_o (x) patch_o``
where ``patch_o`` holds the pixels ``u_{o + t}`` for the taps ``t`` of the kernel. Both products with ``G`` are products
with a matrix over pairs of pixels of one micro-batch (Goodfellow 2015, arXiv:1510.01799, has it for rows):

    B(u, G)_o    = sum_o' K[o, o'] v_o'      K[o, o'] = patch_o . patch_o' = sum_t (u^T u)[o + t, o' + t]
    B^T(v, G)_p  = sum_p' M[p, p'] u_p'      M[p, p'] = sum_t (v^T v)[p - t, p' - t]
    ||G||^2      = sum_{o, o'} K[o, o'] (v^T v)[o, o']

The Gram matrix of patches is thus a sum of shifted Gram matrices of *pixels*. With both images on one flat grid of N
positions, the shift by ``t`` is one offset ``t (N + 1)`` in the flat matrix, and it separates over axes: a few
contiguous additions replace a factor of kernel size in the products. A stride splits ``u`` into sub-images of the
pixels that meet the same taps, each on the grid of ``v``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastreg.rules.bilinear import row_dots

# Multiply-adds of a large product in the time of moving one element: of a pixel matrix, shifted and added; of an image,
# onto the grid or back (bench/NOTES.md, "Convolutions": with these the cheaper form is chosen on every layer there
# but for one, which loses 2 ms).
SHIFT_COST = 32
PLACE_COST = 256


@dataclass(frozen=True)
class SubImage:
    """Pixels of the big image that meet the same taps.

    Attributes:
        pixels: which ones, per axis.
        places: where they lie on the grid, per axis.
        shifts: offsets of their taps on the grid, per axis.
    """

    pixels: tuple[slice, ...]
    places: tuple[slice, ...]
    shifts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PixelGrid:
    """The flat grid on which both images of a convolution lie.

    Padding is shared between neighbours: what a shift moves past the end of a row, an image or the grid arrives in
    the padding in front of the next one, which is zero.

    Attributes:
        extent: positions per axis for one sample.
        small: spatial size of the small image, which lies at the origin.
        sub_images: the big image; one sub-image if the stride is 1.
    """

    extent: tuple[int, ...]
    small: tuple[int, ...]
    sub_images: tuple[SubImage, ...]

    def cost(self, samples: int, big_channels: int, small_channels: int) -> int:
        """Multiply-adds of one product in a micro-batch of ``samples``."""
        additions = sum(len(s) for sub in self.sub_images for s in sub.shifts if len(s) > 1)
        channels = len(self.sub_images) * big_channels + small_channels
        pixels = samples * prod(self.extent)
        return pixels * (pixels + PLACE_COST) * channels + pixels * pixels * SHIFT_COST * additions

    def onto_small(self, u: Tensor, v: Tensor) -> Tensor:
        """``B(u_k, G_k)`` shaped as ``v [m, b, O, *small]``, for ``u [m, b, C, *big]``."""
        moved = torch.bmm(self._place(v, self._origin), self._patch_gram(u))
        return self._take(moved, v.shape[1], self._origin).to(v.dtype)

    def onto_big(self, u: Tensor, v: Tensor) -> Tensor:
        """``B^T(v_k, G_k)`` shaped as ``u [m, b, C, *big]``, for ``v [m, b, O, *small]``."""
        pairs, out = _gram(self._place(v, self._origin)), u.new_zeros(u.shape)
        for sub in self.sub_images:
            moved = torch.bmm(self._place(u[_last(sub.pixels)], sub.places), self._sum_shifted(pairs, sub, back=True))
            out[_last(sub.pixels)] = self._take(moved, u.shape[1], sub.places)
        return out

    def sq_norms(self, u: Tensor, v: Tensor) -> Tensor:
        """``||G_k||^2 [m]`` in float32 or wider."""
        of_small = _gram(self._place(v, self._origin))
        return row_dots(self._patch_gram(u), of_small)

    @property
    def _origin(self) -> tuple[slice, ...]:
        return tuple(slice(size) for size in self.small)

    def _patch_gram(self, u: Tensor) -> Tensor:
        """``K [m, N, N]``; what it holds beyond the small image meets zeros."""
        parts = (
            self._sum_shifted(_gram(self._place(u[_last(sub.pixels)], sub.places)), sub, back=False)
            for sub in self.sub_images
        )
        total = next(parts)
        for part in parts:
            total += part
        return total

    def _sum_shifted(self, matrix: Tensor, sub: SubImage, back: bool) -> Tensor:
        """``sum_t matrix[p + t, p' + t]`` (``p - t`` and ``p' - t`` if ``back``) for ``matrix [m, N, N]``."""
        count, pixels, _ = matrix.shape
        flat, step = matrix.flatten(1), pixels + 1
        for shifts, extent in zip(reversed(sub.shifts), reversed(self.extent)):
            flat = _sum_moved(flat, [shift * step for shift in shifts], back)
            step *= extent
        return flat.view(count, pixels, pixels)

    def _place(self, image: Tensor, places: tuple[slice, ...]) -> Tensor:
        """``[m, b, C, *S]`` on a grid of zeros: ``[m, C, N]``, in float32 or wider."""
        samples, dtype = image.shape[1], torch.promote_types(image.dtype, torch.float32)
        grid = image.new_zeros(image.shape[0], image.shape[2], samples, *self.extent, dtype=dtype)
        grid[_last(places)] = image.transpose(1, 2)
        return grid.flatten(2)

    def _take(self, grid: Tensor, samples: int, places: tuple[slice, ...]) -> Tensor:
        """The inverse of :meth:`_place`."""
        return grid.unflatten(2, (samples, *self.extent))[_last(places)].transpose(1, 2)


def _last(axes: tuple[slice, ...]) -> tuple[Any, ...]:
    """The index of the last dimensions."""
    return (..., *axes)


@lru_cache(maxsize=1024)
def pixel_grid(
    big: tuple[int, ...],
    small: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> PixelGrid:
    """The grid of a convolution from spatial size ``big`` to ``small``."""
    axes = [list(_sub_axes(*axis)) for axis in zip(big, kernel, stride, padding, dilation)]
    extent = []
    for size, subs in zip(small, axes):
        images = (place.stop for _, place, _ in subs)
        reaches = (size + shifts[-1] - place.start for _, place, shifts in subs)
        extent.append(max(size, *images, *reaches))
    return PixelGrid(tuple(extent), small, tuple(SubImage(*zip(*choice)) for choice in product(*axes)))


def _sub_axes(
    size: int, kernel: int, stride: int, padding: int, dilation: int
) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
    """Pixels, places and shifts along one axis for every class modulo the stride that meets a tap."""
    for residue in range(stride):
        shifts = tuple(t * dilation // stride for t in range(kernel) if t * dilation % stride == residue)
        first = (residue - padding) % stride
        front = (first + padding) // stride
        if shifts:
            yield slice(first, size, stride), slice(front, front + len(range(first, size, stride))), shifts


def _gram(placed: Tensor) -> Tensor:
    """``[m, C, N] -> [m, N, N]``."""
    return torch.bmm(placed.mT, placed)


def _sum_moved(flat: Tensor, offsets: list[int], back: bool) -> Tensor:
    """The sum over ``offsets`` of ``flat [m, n]`` moved by them, zeros moving in; segments do not mix."""
    if offsets == [0]:
        return flat
    length = flat.shape[1]
    total = flat.clone() if offsets[0] == 0 else torch.zeros_like(flat)
    for offset in offsets:
        if 0 < offset < length:
            if back:
                total[:, offset:] += flat[:, :-offset]
            else:
                total[:, :-offset] += flat[:, offset:]
    return total
