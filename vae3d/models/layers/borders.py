"""What a convolution sees beyond the borders of a frame."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vae3d.panorama import wrap


@dataclass(frozen=True)
class Borders:
    """width: zeros, or circular: the columns of the other side, as a 360 degree panorama continues.

    height: zeros, or pole: beyond its first row an equirectangular panorama goes on with the same row, turned by 180
    degrees; so at its last. Zeros are added by the convolution itself; the others are written around the frame, one
    pixel at each side (`halo`). none: the convolution does not look beyond (1 x 1).
    Raises ValueError for another word, or poles without circular rows.
    """

    width: str = "zeros"
    height: str = "zeros"

    def __post_init__(self) -> None:
        if self.width not in ("zeros", "circular", "none"):
            raise ValueError(f"pad_w is {self.width!r}; use zeros or circular")
        if self.height not in ("zeros", "pole", "none"):
            raise ValueError(f"pad_h is {self.height!r}; use zeros or pole")
        if self.height == "pole" and self.width != "circular":
            raise ValueError("pad_h=pole turns rows around the panorama; it needs pad_w=circular")

    @property
    def halo(self) -> tuple[int, int]:
        """Rows above and below, columns left and right, that `fill` writes."""
        return int(self.height == "pole"), int(self.width == "circular")

    @property
    def zeros(self) -> tuple[int, int]:
        """Rows and columns of zeros that are left to the convolution."""
        return int(self.height == "zeros"), int(self.width == "zeros")

    def inside(self, padded: Tensor) -> Tensor:
        """[..., H, W] without its halo."""
        rows, columns = self.halo
        height, width = padded.shape[-2:]
        return padded[..., rows : height - rows, columns : width - columns]

    def fill(self, padded: Tensor) -> None:
        """Write the halo of [..., H + 2 rows, W + 2 columns] from its inside, in place."""
        rows, columns = self.halo
        if rows:
            frame = self.inside(padded)
            half = frame.shape[-1] // 2
            for edge, row in ((padded[..., 0, 1:-1], frame[..., 0, :]), (padded[..., -1, 1:-1], frame[..., -1, :])):
                edge[..., :half], edge[..., half:] = row[..., half:], row[..., :half]
        if columns:
            padded[..., 0], padded[..., -1] = padded[..., -2], padded[..., 1]

    def fold(self, grad: Tensor) -> Tensor:
        """Adjoint of `fill`, in place: gradients of the halo go to the pixels that it was copied from."""
        rows, columns = self.halo
        if columns:
            grad[..., -2] += grad[..., 0]
            grad[..., 1] += grad[..., -1]
        if rows:
            frame = self.inside(grad)
            half = frame.shape[-1] // 2
            for edge, row in ((grad[..., 0, 1:-1], frame[..., 0, :]), (grad[..., -1, 1:-1], frame[..., -1, :])):
                row[..., half:] += edge[..., :half]
                row[..., :half] += edge[..., half:]
        return self.inside(grad)

    def pad(self, frames: Tensor) -> Tensor:
        """[N, C, H, W] with its halo; itself where there is none."""
        rows, columns = self.halo
        return wrap(frames, columns, rows) if columns else frames


POINTWISE = Borders("none", "none")
