"""Losses against a teacher; see engine/distillation.py for where its latents and features come from."""

from __future__ import annotations

import torch

from vae3d.losses.objective import Error, numel_per_frame
from vae3d.types import Clip, Reconstruction, TeacherTargets

NORMS = {"mse": torch.square, "l1": torch.abs}


class LatentDistillation:
    """The posterior's mean against the teacher's latents: what makes an encoder interchangeable with the teacher's.

    norm: mse (seraena's TAEHV notebook) or l1, which its author found sharper (taesd#11).
    Raises ValueError for another norm, without a teacher, or if the two have latents of different shapes.
    """

    needs_pixels = False
    needs_posterior = True

    def __init__(self, norm: str = "mse") -> None:
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; use one of {', '.join(NORMS)}")
        self.norm = NORMS[norm]

    def __call__(self, clip: Clip, out: Reconstruction) -> Error:
        own, taught = out.posterior.mean.float(), require_targets(clip).z
        if own.shape != taught.shape:
            raise ValueError(
                f"the model encodes to latents of {_shape(own)} and the teacher to {_shape(taught)}; choose "
                "data.frames that both take whole"
            )
        return Error(self.norm(own - taught), numel_per_frame(taught))


class FeatureDistillation:
    """Squared error between projected features inside the student's decoder and the teacher's, one frame per latent:
    Turbo-VAED (arXiv 2508.09136, section 3.3). The mean over modules that `teacher.features` pairs.

    Raises ValueError if it pairs none.
    """

    needs_pixels = False

    def __call__(self, clip: Clip, out: Reconstruction) -> Error:
        taught = require_targets(clip).features
        if not taught:
            raise ValueError("feature distillation needs teacher.features, as {module of the model: of the teacher}")
        errors = [(out.features[name].float() - taught[name]).square().mean((1, 2, 3, 4)) for name in taught]
        first = next(iter(taught.values()))
        return Error(torch.stack(errors).mean(0), numel_per_frame(first))


def require_targets(clip: Clip) -> TeacherTargets:
    if clip.targets is None:
        raise ValueError(
            "distillation needs a teacher; set teacher=vae teacher.path=..., or the weights of its terms to 0"
        )
    return clip.targets


def _shape(latents: torch.Tensor) -> str:
    return "x".join(map(str, latents.shape[1:]))
