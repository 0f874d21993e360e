"""Learning from a frozen teacher: its latents, and the features inside its decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vae3d.errors import UserError
from vae3d.models.latents import convert_latents, latent_space
from vae3d.precision import cast_keep_stats
from vae3d.seeding import generator_of, seed_of
from vae3d.types import Clip, Reconstruction, TeacherTargets


class TeacherError(UserError):
    """A teacher that does not fit the student."""


class Distillation:
    """What a teacher gives to every step. It is frozen, in eval mode and in its own precision.

    decode: which latents the student decodes: `teacher`, `own`, or `mixed`, one or the other by a coin per step.
    features: module of the student -> module of the teacher that it imitates, as named_modules() names them.
    seed: the run's, for coins and sampled latents.
    Raises TeacherError if the two do not share a latent space's shape, or have no such modules.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        dtype: torch.dtype = torch.float32,
        sample: bool = False,
        decode: str = "teacher",
        features: dict[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.teacher = cast_keep_stats(teacher.requires_grad_(False).eval(), dtype)
        self.dtype, self.sample, self.decode, self.features = dtype, sample, decode, dict(features or {})
        self.seed = seed
        self.student = student
        if teacher.spec.channels != student.spec.channels:
            raise TeacherError(
                f"teacher.path: the teacher has {teacher.spec.channels} latent channels and the model "
                f"{student.spec.channels}; they must share their latents"
            )
        if latent_space(teacher) == "normalized" and latent_space(student) == "raw":
            raise TeacherError(
                "teacher.path: the teacher's latents are those that a diffusion model sees, and the model's are raw; "
                "set model.latent=normalized"
            )
        for network, whose, names in (
            (student, "model", self.features.keys()),
            (teacher, "teacher", self.features.values()),
        ):
            known = dict(network.named_modules())
            if unknown := [name for name in names if name not in known]:
                raise TeacherError(f"teacher.features: the {whose} has no module {', '.join(unknown)}")

    @torch.no_grad()
    def compute_targets(self, clip: Clip) -> Clip:
        """The clip with what the teacher makes of it: latents as the student has them, and features."""
        video = clip.video.to(self.dtype)
        posterior = self.teacher.encode(video)
        z = posterior.sample(self._noise(clip)) if self.sample else posterior.mode()
        features: dict[str, Tensor] = {}
        if self.features:
            with capture_activations(self.teacher, list(self.features.values()), len(video)) as found:
                self.teacher.decode(z.to(self.dtype), video.shape[2])
            features = {name: one_per_latent(found(inner), z.shape[2]) for name, inner in self.features.items()}
        latents = convert_latents(z.float(), self.teacher, self.student)
        return replace(clip, targets=TeacherTargets(latents, {name: f.float() for name, f in features.items()}))

    def latents(self, clip: Clip, step: int) -> Tensor | None:
        """What the student decodes in this step: the teacher's latents, or None for its own."""
        own = self.decode == "own" or (self.decode == "mixed" and seed_of(self.seed, "coin", step) % 2)
        return None if own else clip.targets.z

    def wrap_student(self, student: nn.Module, frames: int) -> nn.Module:
        """What training calls instead of the student: the student, or, for its features, a StudentWithProjections around it."""
        if not self.features:
            return student
        video = torch.zeros(
            1, 3, frames, *[2 * student.spec.space_stride] * 2, device=next(student.parameters()).device
        )
        target = self.compute_targets(Clip(video, torch.zeros(1, dtype=torch.long), [""])).targets
        with torch.no_grad(), capture_activations(student, list(self.features), 1) as found:
            student(video, latents=target.z)
        shapes = {name: one_per_latent(found(name), target.z.shape[2]).shape for name in self.features}
        for name, shape in shapes.items():
            if shape[2:] != target.features[name].shape[2:]:
                raise TeacherError(
                    f"teacher.features.{name}: the model's features are {_size(shape)} where the teacher's "
                    f"{self.features[name]} are {_size(target.features[name].shape)}; choose modules of one resolution"
                )
        channels = {name: (shape[1], target.features[name].shape[1]) for name, shape in shapes.items()}
        return StudentWithProjections(student, channels).to(video.device)

    def _noise(self, clip: Clip) -> list[torch.Generator] | None:
        if clip.video.is_meta:
            return None
        device = clip.video.device
        return [generator_of(self.seed, position, "teacher", device=device) for position in clip.positions.tolist()]


class StudentWithProjections(nn.Module):
    """A student whose features leave it together with its reconstruction, projected to the width of the teacher's.

    channels: module of the student -> (its channels, the teacher's). Only `projections` is new; it trains along and is
    thrown away after (Turbo-VAED, arXiv 2508.09136, section 3.3).
    """

    def __init__(self, student: nn.Module, channels: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.student = student
        self.names = list(channels)
        self.projections = nn.ModuleList(nn.Conv3d(*pair, 1) for pair in channels.values())

    def forward(self, video: Tensor, **how: Any) -> Reconstruction:
        with capture_activations(self.student, self.names, len(video)) as found:
            out = self.student(video, **how)
        features = {
            name: project(one_per_latent(found(name), out.z.shape[2]))
            for name, project in zip(self.names, self.projections, strict=True)
        }
        return replace(out, features=features)


@contextmanager
def capture_activations(network: nn.Module, names: Sequence[str], clips: int) -> Iterator[Callable[[str], Tensor]]:
    """Inside this context the outputs of modules are kept; yields a function from a module's name to what it gave for
    so many clips, [B, C, T, H, W], over all chunks that they were coded in.

    Raises TeacherError if a module gives frames, whose order only networks with `as_video` tell (see TAEHV).
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, output: Any) -> None:
        features = output[0] if isinstance(output, tuple) else output
        if features.ndim == 4 and hasattr(network, "as_video"):
            features = network.as_video(features, clips)
        if features.ndim != 5:
            raise TeacherError(f"teacher.features: {name} gives no video but {_size(features.shape)}; choose another")
        kept[name].append(features)

    hooks = [
        network.get_submodule(name).register_forward_hook(lambda _m, _in, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        yield lambda name: torch.cat(kept[name], 2)
    finally:
        for hook in hooks:
            hook.remove()


def one_per_latent(features: Tensor, latents: int) -> Tensor:
    """The last frame that each latent stands for, of features at any frame rate: [B, C, latents, H, W].

    Features have k frames per latent, or, where a causal decoder has dropped the first ones, 1 + k * (latents - 1), for
    k a power of two, which tells the two apart.
    Raises TeacherError for another number of frames.
    """
    frames = features.shape[2]
    for k in (1, 2, 4, 8, 16):
        if frames == k * latents:
            return features[:, :, k - 1 :: k]
        if frames == 1 + k * (latents - 1):
            return features[:, :, ::k]
    raise TeacherError(f"teacher.features: {frames} frames of features do not fit {latents} latent frames")


def _size(shape: torch.Size) -> str:
    return "x".join(map(str, shape[2:]))
