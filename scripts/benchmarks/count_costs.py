"""Count forward FLOPs of a training step and the activations kept for backward, without running it.

    python scripts/benchmarks/count_costs.py

Uses fake tensors: shapes only, no memory, no GPU. bf16 autocast over fp32 weights, one clip of 256 x 256. A
multiply-add counts as 2 FLOPs. The published loop of Open-Sora 1.2 runs the pixel path in every stage, for logging, and
checkpoints nothing; its rows are counted on the same networks with all activations kept.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import vae3d
from vae3d.commands.step_cost import give_shapes
from vae3d.losses.latent import KL, Identity, LatentL1
from vae3d.losses.objective import Objective, WeightedTerm
from vae3d.losses.perceptual import LPIPS
from vae3d.losses.pixel import L1
from vae3d.training.freeze import set_mode, train_parts
from vae3d.types import ClipBatch

TEMPORAL = {"temporal_encoder": 1.0, "temporal_decoder": 1.0}
EVERYTHING = {"all": 1.0}


@dataclass
class Cost:
    tera_flops: float
    kept_gib: float  # activations
    cast_gib: float  # bf16 copies of fp32 weights


class LiveStorages(TorchDispatchMode):
    """Tracks the live storages that operators create, casts of parameters separately."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.made = weakref.WeakSet()
        self.casts = weakref.WeakSet()
        self.parameters = {p.untyped_storage()._cdata for p in parameters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        from_parameter = func is torch.ops.aten._to_copy.default and any(
            x.untyped_storage()._cdata in self.parameters for x in inputs
        )
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.parameters:
                (self.casts if from_parameter else self.made).add(x.untyped_storage())
        return out

    @staticmethod
    def gib(storages: weakref.WeakSet) -> float:
        unique = {s._cdata: s.nbytes() for s in storages}
        return sum(unique.values()) / 2**30


def stage(number: int, checkpointing: bool, pixels: bool) -> tuple[Objective, dict[str, float]]:
    lpips = WeightedTerm(LPIPS(gradient_checkpointing=checkpointing, frame_batch=4 if checkpointing else 64), 0.1)
    terms = {"kl": WeightedTerm(KL(), 1e-6)}
    if number < 3:
        terms |= {"latent": WeightedTerm(LatentL1(), 1.0), "identity": WeightedTerm(Identity(), 1.0)}
    if number == 3 or pixels:
        terms |= {"l1": WeightedTerm(L1(), 1.0), "lpips": lpips}
    return Objective(terms, "sum"), TEMPORAL if number < 3 else EVERYTHING


def count(number: int, frames: int, *, checkpointing: bool = True, pixels: bool = False, size: int = 256) -> Cost:
    """Cost of one forward pass of a stage with its loss."""
    on = str(checkpointing).lower()
    with FakeTensorMode():
        model = vae3d.build(
            "temporal_vae",
            "model.micro_frames=null",
            f"model.spatial.gradient_checkpointing={on}",
            f"model.spatial.frame_batch={4 if checkpointing else 'null'}",
        )
        objective, parts = stage(number, checkpointing, pixels)
        for t in objective.terms.values():
            if isinstance(t.term, LPIPS):
                give_shapes(t.term.network)
        train_parts(model, parts)
        set_mode(model, parts)
        clip = ClipBatch(torch.zeros(1, 3, frames, size, size), torch.zeros(1, dtype=torch.long), [""])
        live = LiveStorages(list(model.parameters()))
        flops = FlopCounterMode(display=False)
        with live, flops, torch.autocast("cpu", torch.bfloat16):
            out = model(clip.video, pixels=objective.needs_pixels)
            loss, metrics = objective(clip, out, 0)
        del out, metrics
        cost = Cost(flops.get_total_flops() / 1e12, live.gib(live.made), live.gib(live.casts))
        del loss
    return cost


def main() -> None:
    rows = [
        ("stage 1, 17 frames, published loop", count(1, 17, checkpointing=False, pixels=True)),
        ("stage 1, 17 frames, vae3d", count(1, 17)),
        ("stage 1, 1 frame, vae3d", count(1, 1)),
        ("stage 3, 33 frames, nothing checkpointed", count(3, 33, checkpointing=False)),
        ("stage 3, 33 frames, vae3d", count(3, 33)),
        ("stage 3, 17 frames, vae3d", count(3, 17)),
    ]
    print(f"{'256x256, bf16, one clip':44}{'TFLOP forward':>14}{'kept, GiB':>11}{'bf16 weights, GiB':>19}")
    for name, cost in rows:
        print(f"{name:44}{cost.tera_flops:14.2f}{cost.kept_gib:11.2f}{cost.cast_gib:19.2f}")
    published, ours = rows[0][1], rows[1][1]
    print(f"\nstage 1 forward: {ours.tera_flops / published.tera_flops:.1%} of the published loop's FLOPs")


if __name__ == "__main__":
    main()
