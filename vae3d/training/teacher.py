"""Distillation from a frozen teacher: its latents, and features of its decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vae3d.errors import UserError
from vae3d.hashing import weights_hash
from vae3d.models.interface import convert_latents, latent_space
from vae3d.models.registry import config_of
from vae3d.precision import cast_keep_stats
from vae3d.seeding import seed_of
from vae3d.text import plural
from vae3d.training.teacher_cache import TargetCache
from vae3d.types import ClipBatch, Reconstruction, TeacherTargets


class TeacherError(UserError):
    """A teacher that does not fit the student."""


class Distillation:
    """Computes a teacher's targets for each clip. The teacher is frozen, in eval mode and in its own precision.

    sample: sample its latents instead of taking the mode. decode: which latents the student decodes: `teacher`, `own`,
    or `mixed`, which picks one of them at random per step. features: module of the student -> module of the teacher
    whose output it should match, by their names in named_modules(). seed: of the random choice and sampled latents.
    cache: folder of a TargetCache of at most cache_gib GiB, or None.
    Raises TeacherError if they take other channels of pixels, their latent spaces differ in shape, or a module does not
    exist.
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
        cache: str | None = None,
        cache_gib: float = 50.0,
    ) -> None:
        self.teacher = cast_keep_stats(teacher.requires_grad_(False).eval(), dtype)
        self.dtype, self.sample, self.decode, self.features = dtype, sample, decode, dict(features or {})
        self.seed = seed
        self.student = student
        if teacher.spec.channels != student.spec.channels:
            raise TeacherError(
                f"teacher.path: the teacher has {plural(teacher.spec.channels, 'latent channel')} and the model "
                f"{student.spec.channels}; they must share their latents"
            )
        if teacher.pixel_channels != student.pixel_channels:
            raise TeacherError(
                f"teacher.path: the teacher takes {plural(teacher.pixel_channels, 'channel')} of pixels and the model "
                f"{student.pixel_channels}; use model.pixel_channels={teacher.pixel_channels}, or fine-tune the "
                f"teacher with model.pixel_channels={student.pixel_channels} first"
            )
        if latent_space(teacher) == "normalized" and latent_space(student) == "raw":
            raise TeacherError(
                "teacher.path: the teacher's latents are normalized, the model's are raw; set model.latent=normalized"
            )
        for network, whose, names in ((student, "model", self.features), (teacher, "teacher", self.features.values())):
            if missing := [text for name in names if (text := _missing_module(network, name))]:
                raise TeacherError(f"teacher.features: the {whose} has no module {'; no module '.join(missing)}")

        self.cache = None
        if cache is not None and not next(teacher.parameters()).is_meta:
            of = {
                "config": config_of(teacher),  # also padding and latent scale, which no weight holds
                "weights": weights_hash(self.teacher.state_dict()),
                "precision": str(dtype),
                "features": self.features,
                "student": latent_space(student),
            }
            self.cache = TargetCache(cache, of, cache_gib)

    def compute_targets(self, batch: ClipBatch, pixels: Tensor | None = None) -> ClipBatch:
        """The clip with targets: the teacher's latents in the student's convention, and features. No gradients.

        They are from the cache if it has all of the clips; otherwise they are computed, and added to it, which waits
        for the device. pixels: of the clips, in host memory, from which the cache knows them; by default batch.video.
        """
        if self.cache is None or (batch.positions < 0).any():  # the preflight's noise never comes again
            return self._compute_targets(batch)
        keys = self.cache.keys(batch.video if pixels is None else pixels)
        if (targets := self.cache.read(keys, batch.video.device)) is not None:
            return replace(batch, targets=targets)
        batch = self._compute_targets(batch)
        self.cache.write(keys, batch.targets)
        return batch

    @torch.no_grad()
    def _compute_targets(self, batch: ClipBatch) -> ClipBatch:
        video = batch.video.to(self.dtype)
        posterior = self.teacher.encode(video)
        z = posterior.mode()
        if self.sample:
            z = posterior.sample(batch.generators(self.seed, video.device, "teacher"))
        features: dict[str, Tensor] = {}
        if self.features:
            with capture_activations(self.teacher, list(self.features.values()), len(video)) as activations:
                self.teacher.decode(z.to(self.dtype), video.shape[2])
            features = {name: one_per_latent(activations(inner), z.shape[2]) for name, inner in self.features.items()}
        # Contiguous, as a cache returns them: the order of sums depends on it.
        latents = convert_latents(z.float(), self.teacher, self.student).contiguous()
        features = {name: tensor.float().contiguous() for name, tensor in features.items()}
        return replace(batch, targets=TeacherTargets(latents, features))

    def latents(self, batch: ClipBatch, step: int) -> Tensor | None:
        """The latents that the student decodes in this step: the teacher's, or None for its own."""
        own = self.decode == "own" or (self.decode == "mixed" and seed_of(self.seed, "coin", step) % 2)
        return None if own else batch.targets.z

    def wrap_student(self, student: nn.Module, frames: int) -> nn.Module:
        """The module to train: the student, wrapped in StudentWithProjections if features are distilled.

        frames: of the clip on which feature shapes are measured.
        """
        if not self.features:
            return student
        video = torch.zeros(
            1,
            student.pixel_channels,
            frames,
            *[2 * student.spec.space_stride] * 2,
            device=next(student.parameters()).device,
        )
        target = self._compute_targets(ClipBatch(video, torch.zeros(1, dtype=torch.long), [""])).targets
        with torch.no_grad(), capture_activations(student, list(self.features), 1) as activations:
            student(video, latents=target.z)
        shapes = {name: one_per_latent(activations(name), target.z.shape[2]).shape for name in self.features}
        for name, shape in shapes.items():
            if shape[2:] != target.features[name].shape[2:]:
                raise TeacherError(
                    f"teacher.features.{name}: the model's features are {_size(shape)} where the teacher's "
                    f"{self.features[name]} are {_size(target.features[name].shape)}; choose modules of one resolution"
                )
        channels = {name: (shape[1], target.features[name].shape[1]) for name, shape in shapes.items()}
        return StudentWithProjections(student, channels).to(video.device)


class StudentWithProjections(nn.Module):
    """A student that also returns features, projected to the teacher's number of channels.

    channels: module of the student -> (its channels, the teacher's). `projections` are trained with the student and are
    not exported (Turbo-VAED, arXiv 2508.09136, section 3.3).
    """

    def __init__(self, student: nn.Module, channels: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.student = student
        self.names = list(channels)
        self.projections = nn.ModuleList(nn.Conv3d(*pair, 1) for pair in channels.values())
        for name in self.names:
            # For good: fused layers run apart where there is a hook (wan_blocks.is_hooked), and when gradient
            # checkpointing recomputes them, in backward, those of capture_activations are gone.
            student.get_submodule(name).register_forward_hook(_keep_apart)

    def forward(self, video: Tensor, **settings: Any) -> Reconstruction:
        with capture_activations(self.student, self.names, len(video)) as activations:
            out = self.student(video, **settings)
        features = {
            name: project(one_per_latent(activations(name), out.z.shape[2]))
            for name, project in zip(self.names, self.projections, strict=True)
        }
        return replace(out, features=features)


def _keep_apart(module: nn.Module, given: Any, output: Any) -> None:
    """A hook that does nothing."""


@contextmanager
def capture_activations(network: nn.Module, names: Sequence[str], clips: int) -> Iterator[Callable[[str], Tensor]]:
    """Record the outputs of modules. Yields a function: module name -> its output [B, C, T, H, W], chunks concatenated.

    clips: batch size, for networks whose modules return frames [N, C, H, W] in any number of calls, which `as_video`
    turns into clips (TAEHV, TAESD, SpatialVAE). Raises TeacherError for outputs of any other form.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    frames = hasattr(network, "as_video")

    def keep(name: str, output: Any) -> None:
        features = output[0] if isinstance(output, tuple) else output
        if features.ndim != (4 if frames else 5):
            raise TeacherError(f"teacher.features: {name} returns no video but {_size(features.shape)}; choose another")
        kept[name].append(features)

    hooks = [
        network.get_submodule(name).register_forward_hook(lambda _m, _in, output, name=name: keep(name, output))
        for name in names
    ]
    try:
        yield lambda name: network.as_video(torch.cat(kept[name]), clips) if frames else torch.cat(kept[name], 2)
    finally:
        for hook in hooks:
            hook.remove()


def one_per_latent(features: Tensor, latents: int) -> Tensor:
    """The last feature frame of each latent frame: [B, C, T, H, W] -> [B, C, latents, H, W].

    T is k * latents or, after a causal decoder, 1 + k * (latents - 1), for a power of two k.
    Raises TeacherError for any other T.
    """
    frames = features.shape[2]
    for k in (1, 2, 4, 8, 16):
        if frames == k * latents:
            return features[:, :, k - 1 :: k]
        if frames == 1 + k * (latents - 1):
            return features[:, :, ::k]
    raise TeacherError(
        f"teacher.features: {plural(frames, 'frame')} of features do not fit {plural(latents, 'latent frame')}"
    )


def _missing_module(network: nn.Module, name: str) -> str | None:
    """A module that does not exist, and what there is instead; None if it exists."""
    known = dict(network.named_modules())
    if name in known:
        return None
    parent = name
    while parent not in known:
        parent = parent.rpartition(".")[0]
    children = ", ".join(child for child, _ in known[parent].named_children())
    return f"{name}; in {parent or 'it'} there are {children or 'none'}"


def _size(shape: torch.Size) -> str:
    return "x".join(map(str, shape[2:]))
