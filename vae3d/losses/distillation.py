"""Losses against a teacher, whose latents and features training/teacher.py computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vae3d.losses.objective import ErrorMap, Term, numel_per_frame
from vae3d.types import ClipBatch, Reconstruction, TeacherTargets

NORMS = {"mse": torch.square, "l1": torch.abs}


@dataclass(eq=False)
class LatentDistillation(Term):
    """Error of the posterior's mean against the teacher's latents, to make the encoders interchangeable.

    norm: mse, as in `TAEHV_Training_Example.ipynb` of madebyollin/seraena, or l1, sharper according to its author
    (madebyollin/taesd#11). Raises ValueError for another norm, without a teacher, or if the latents differ in shape.
    """

    needs_pixels = False
    needs_posterior = True

    norm: Literal["mse", "l1"] = "mse"

    def __call__(self, batch: ClipBatch, out: Reconstruction) -> ErrorMap:
        mean = out.posterior.mean.float()
        target = require_targets(batch).z
        if mean.shape != target.shape:
            raise ValueError(
                f"the model encodes to latents of {_shape(mean)} and the teacher to {_shape(target)}; choose "
                "data.frames that both take without padding"
            )
        return ErrorMap(NORMS[self.norm](mean - target), numel_per_frame(target))


class FeatureDistillation(Term):
    """Squared error between projected features of the student's decoder and the teacher's, one frame per latent:
    Turbo-VAED (arXiv 2508.09136, section 3.3). Mean over the pairs of modules in `teacher.features`.

    Raises ValueError if there are none.
    """

    needs_pixels = False

    def __call__(self, batch: ClipBatch, out: Reconstruction) -> ErrorMap:
        targets = require_targets(batch).features
        if not targets:
            raise ValueError("feature distillation needs teacher.features, as {module of the model: of the teacher}")
        errors = [(out.features[name].float() - targets[name]).square().mean((1, 2, 3, 4)) for name in targets]
        first = next(iter(targets.values()))
        return ErrorMap(torch.stack(errors).mean(0), numel_per_frame(first))


def require_targets(batch: ClipBatch) -> TeacherTargets:
    if batch.targets is None:
        raise ValueError(
            "distillation needs a teacher; set teacher=vae teacher.path=..., or the weights of its terms to 0"
        )
    return batch.targets


def _shape(latents: torch.Tensor) -> str:
    return "x".join(map(str, latents.shape[1:]))
