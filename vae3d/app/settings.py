"""What a job of the page reconstructs, and the limits. Imports no torch: the server does without."""

from __future__ import annotations

from dataclasses import dataclass

from vae3d.errors import UserError
from vae3d.text import plural

READING = "reading"  # the stage of a job in which its file is decoded
LATENTS = ("none", "grey", "colours")  # how latents are shown
MAX_NOISE = 3.0  # standard deviations of the latents
LESS_MEMORY = "choose fewer frames, a smaller height or fewer checkpoints, or start with --tile"


@dataclass(frozen=True)
class Limits:
    """upload: bytes of a file. frames, height: of what is reconstructed. pixels: of all its frames together. wait:
    seconds without progress after which reading a file is given up. keep: seconds for which unused uploads and results
    are kept."""

    upload: int = 500_000_000
    frames: int = 129
    height: int = 1080
    pixels: int = 100_000_000
    wait: float = 60.0
    keep: float = 3600.0


@dataclass(frozen=True)
class Settings:
    """A job. checkpoints: indices of those on the command line, in the order of the panels. start: first frame. frames,
    height: at most. noise: standard deviation of noise on the latents, in units of theirs. beside: show the
    reconstruction without noise too. latents: one of LATENTS.
    """

    checkpoints: tuple[int, ...]
    frames: int = 33
    height: int = 256
    start: int = 0
    noise: float = 0.0
    beside: bool = False
    latents: str = "none"

    def check(self, limits: Limits, checkpoints: int) -> None:
        """checkpoints: how many there are. Raises UserError that names a value that is too large, or does not exist."""
        known = all(0 <= index < checkpoints for index in self.checkpoints)
        if not self.checkpoints or not known or len(set(self.checkpoints)) < len(self.checkpoints):
            raise UserError("choose at least one of the checkpoints, each once")
        for name, value, limit in (("frames", self.frames, limits.frames), ("height", self.height, limits.height)):
            if not 1 <= value <= limit:
                raise UserError(f"{name} is {value}; choose 1 to {limit} (`--max_{name}` changes the limit)")
        if self.start < 0:
            raise UserError(f"the first frame is {self.start}; choose 0 or more")
        if not 0 <= self.noise <= MAX_NOISE:
            raise UserError(f"noise is {self.noise}; choose 0 to {MAX_NOISE:g}")
        if self.latents not in LATENTS:
            raise UserError(f"latents is {self.latents!r}; choose one of {', '.join(LATENTS)}")


def check_pixels(frames: int, height: int, width: int, limits: Limits) -> None:
    """Raises UserError if a clip has more pixels than the limit."""
    pixels = frames * height * width
    if pixels > limits.pixels:
        raise UserError(
            f"{plural(frames, 'frame')} of {width} x {height} are {pixels / 1e6:.1f} million pixels, and the limit is "
            f"{limits.pixels / 1e6:g}; choose fewer frames or a smaller height (`--max_megapixels` changes the limit)"
        )
