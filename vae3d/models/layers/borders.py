"""Padding of frames at their borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vae3d.panorama import wrap


@dataclass(frozen=True)
class Borders:
    """How a 3 x 3 convolution pads its input.

    width: zeros, circular (the opposite columns, as a 360 degree panorama continues) or none (1 x 1 convolutions).
    height: zeros, none, or pole: beyond its first row an equirectangular panorama continues with the same row, turned
    by 180 degrees, and likewise at its last. The convolution adds zeros by itself; circular and pole padding, of one
    pixel on each side, is written into its input.
    Raises ValueError for pole without circular.
    """

    width: Literal["zeros", "circular", "none"] = "zeros"
    height: Literal["zeros", "pole", "none"] = "zeros"

    def __post_init__(self) -> None:
        if self.height == "pole" and self.width != "circular":
            raise ValueError("pad_h=pole turns rows around the panorama; it needs pad_w=circular")

    @property
    def padding(self) -> tuple[int, int]:
        """(rows, columns) on each side that `pad` writes."""
        return int(self.height == "pole"), int(self.width == "circular")

    @property
    def zero_padding(self) -> tuple[int, int]:
        """(rows, columns) of zeros on each side that the convolution adds."""
        return int(self.height == "zeros"), int(self.width == "zeros")

    def pad(self, frames: Tensor) -> Tensor:
        """Pad [N, C, H, W]; returns `frames` itself if there is nothing to write."""
        rows, columns = self.padding
        return wrap(frames, columns, rows) if columns else frames

    def crop(self, padded: Tensor) -> Tensor:
        """View of [..., H, W] without its padding."""
        rows, columns = self.padding
        height, width = padded.shape[-2:]
        return padded[..., rows : height - rows, columns : width - columns]

    def pad_(self, padded: Tensor) -> None:
        """Write the padding of [..., H + 2 rows, W + 2 columns] from its inside, in place."""
        rows, columns = self.padding
        if rows:
            half, odd = divmod(padded.shape[-1] - 2, 2)
            if odd:
                raise ValueError(f"pad_h=pole needs an even number of columns; these are {2 * half + 1}")
            padded[..., 0, 1:-1] = padded[..., 1, 1:-1].roll(half, -1)
            padded[..., -1, 1:-1] = padded[..., -2, 1:-1].roll(half, -1)
        if columns:
            padded[..., 0] = padded[..., -2]
            padded[..., -1] = padded[..., 1]

    def pad_adjoint_(self, grad: Tensor) -> Tensor:
        """Adjoint of `pad_`: add the padding's gradients to the pixels it was copied from, in place, and crop."""
        rows, columns = self.padding
        if columns:
            grad[..., -2] += grad[..., 0]
            grad[..., 1] += grad[..., -1]
        if rows:
            half = grad.shape[-1] // 2 - 1
            grad[..., 1, 1:-1] += grad[..., 0, 1:-1].roll(half, -1)
            grad[..., -2, 1:-1] += grad[..., -1, 1:-1].roll(half, -1)
        return self.crop(grad)


POINTWISE = Borders("none", "none")
