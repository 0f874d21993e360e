"""Count the memory of a training step of the SD VAE with its GAN, item by item, without running it.

    python scripts/benchmarks/count_sd_vae_memory.py                                      # 256 pixels
    python scripts/benchmarks/count_sd_vae_memory.py data.height=512 data.width=512
    python scripts/benchmarks/count_sd_vae_memory.py adversary=none model.gradient_checkpointing=false

Arguments are settings of train.py, added to RECIPE. Uses fake tensors: shapes only, no memory, no GPU. Counts the
second micro-batch of a step with every loss and the discriminator on, when the first one's gradients and the
optimizer's moments exist. Does not count the CUDA context and libraries (about 0.5 GiB), cuDNN's workspace, the
allocator's fragmentation, or a validation, which keeps nothing for backward but whose rFID network has 0.1 GiB.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable
from dataclasses import asdict

import hydra
import torch
from torch import Tensor, nn

from vae3d import loading
from vae3d.adversarial.base import NoAdversary, UpdatePhase
from vae3d.commands import train
from vae3d.commands.estimate import fake_tensors, give_shapes
from vae3d.config.check import read
from vae3d.config.schema import CONF, TrainConfig
from vae3d.models.interface import attach_decoder
from vae3d.precision import DTYPES, autocast
from vae3d.schedules import ALL_ON
from vae3d.training.ema import Ema
from vae3d.training.freeze import set_mode, train_parts
from vae3d.training.memory import PeakMemory
from vae3d.training.proximal import Proximal
from vae3d.training.teacher import StudentWithProjections
from vae3d.types import ClipBatch

RECIPE = ("experiment=sd_vae_gan", "data.source.path=none")
GIB = 2**30


BOTH = UpdatePhase(model=True, discriminator=True)


def composed(overrides: Iterable[str], recipe: Iterable[str] = RECIPE) -> TrainConfig:
    """The configuration of `recipe` and `overrides`."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return read(hydra.compose("train", [*recipe, *overrides]), TrainConfig)[0]


class Recipe:
    """Model, losses, adversary and optimizer of a configuration, built and used as vae3d.training does.

    teacher: the network that teacher.path would open.
    """

    def __init__(self, config: TrainConfig, device: torch.device, teacher: nn.Module | None = None) -> None:
        self.config, self.device = config, device
        self.model = loading.instantiate(config.model).to(device)
        groups = train_parts(self.model, config.stage.train)
        set_mode(self.model, config.stage.train)
        if config.stage.no_micro_batching and hasattr(self.model, "micro_frames"):
            self.model.micro_frames = None
        self.distillation, self.student = train.build_distillation(config, teacher, self.model), self.model
        if self.distillation is not None:
            self.student = self.distillation.wrap_student(self.model, config.data.frames.max)
        if isinstance(self.student, StudentWithProjections):
            groups.append({"params": list(self.student.projections.parameters())})
        self.objective = train.build_objective(config.loss)
        self.loss_networks = [t.term.network for t in self.objective.terms.values() if hasattr(t.term, "network")]
        self.adversary = loading.instantiate(config.adversary)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=tuple(config.optim.betas), fused=fused)

    def prepare(self) -> None:
        """Build the EMA and the discriminator, as the trainer does before the first step."""
        self.ema = Ema(self.model, **{**asdict(self.config.trainer.ema), "device": "model"})
        self.proximal = Proximal(self.model, self.config.optim.proximal)
        self.adversary.load(self.model, self.device, self.config.run.seed, 0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] + ([] if isinstance(self.adversary, NoAdversary) else [self.adversary.optimizer])

    def passes(
        self,
        batch: ClipBatch,
        done: Callable[[str], None] = lambda what: None,
        step: int = ALL_ON,
        phase: UpdatePhase = BOTH,
    ) -> None:
        """Forward and backward of a micro-batch. done: called with the name of each part when it ends."""
        settings = {"pixels": self.objective.needs_pixels, "noise": self.config.stage.latent_noise}
        if self.distillation is not None:
            batch = self.distillation.compute_targets(batch)
            settings["latents"] = self.distillation.latents(batch, step)
            settings["encode"] = self.objective.needs_posterior
        with autocast(self.device, self.config.trainer.precision), torch.set_grad_enabled(phase.model):
            out = self.student(batch.video, **settings)
        out = attach_decoder(out, self.model)
        done("forward")
        if phase.model:
            loss, _ = self.objective(batch, out, step)
            adversarial, _ = self.adversary.generator_loss(batch, out, loss, step)
            done("losses")
            ((loss + adversarial) / self.config.trainer.accumulate).backward()
            del loss, adversarial
            done("backward")
        if phase.discriminator and not isinstance(self.adversary, NoAdversary):
            adversary_loss, _ = self.adversary.discriminator_loss(batch, out, step)
            (adversary_loss / self.config.trainer.accumulate).backward()
            done("discriminator")

    def update(self) -> None:
        """Update the networks, without communication between ranks."""
        nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(0)
        if not isinstance(self.adversary, NoAdversary):
            self.adversary.optimizer.step()
            self.adversary.reset_step()


def clip_of(config: TrainConfig, device: torch.device, frames: int | None = None, world_size: int = 1) -> ClipBatch:
    """A micro-batch of noise on one rank. frames: of each clip; None: the most."""
    data = config.data
    clips = data.batch_size // (config.trainer.accumulate * world_size)
    size = (clips, 3, frames or data.frames.max, data.height, data.width)
    return ClipBatch(torch.rand(size, device=device) * 2 - 1, torch.arange(size[0]), ["noise"] * size[0])


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of all storages, each counted once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if x is not None}
    return sum(storages.values())


def persistent(recipe: Recipe, batch: ClipBatch) -> dict[str, int]:
    """Bytes that persist between two micro-batches, by item."""
    model = recipe.model
    found = {
        "weights": bytes_of(model.parameters()),
        "gradients": bytes_of(p.grad for p in model.parameters()),
        "moments of AdamW": bytes_of(moments(recipe.optimizer)),
        "averaged weights (EMA)": bytes_of(recipe.ema.shadow.values()),
    }
    if recipe.proximal.anchor:
        found["initial weights (optim.proximal)"] = bytes_of(recipe.proximal.anchor.values())
    if recipe.distillation is not None:
        found["teacher"] = bytes_of(recipe.distillation.teacher.parameters())
    if not isinstance(recipe.adversary, NoAdversary):
        network, optimizer = recipe.adversary.discriminator, recipe.adversary.optimizer
        tensors = [*network.parameters(), *network.buffers(), *(p.grad for p in network.parameters())]
        found["discriminator, its gradients and moments"] = bytes_of([*tensors, *moments(optimizer)])
    in_loss = [x for network in recipe.loss_networks for x in (*network.parameters(), *network.buffers())]
    return found | {"LPIPS": bytes_of(in_loss), "clip": bytes_of([batch.video])}


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]


def build(config: TrainConfig, teacher: Callable[[], nn.Module] | None = None, device: str = "cpu") -> Recipe:
    """A recipe on fake tensors, or on the meta device, which is faster but has no autocast.

    teacher: builds the network that teacher.path would open.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.teacher.precision])  # since fake parameters cannot be cast later
    try:
        with torch.device(device):
            network = teacher and teacher()
    finally:
        torch.set_default_dtype(default)
    with torch.device(device):
        recipe = Recipe(config, torch.device(device), network)
    if device != "meta":
        for network in recipe.loss_networks:
            give_shapes(network)
    recipe.prepare()
    return recipe


def count(overrides: Iterable[str] = ()) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each persistent item, and the extra peak of each part of a step of RECIPE."""
    return count_memory(composed(overrides))


def count_memory(
    config: TrainConfig, teacher: Callable[[], nn.Module] | None = None, world_size: int = 1
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each persistent item on one of `world_size` ranks, and the extra peak of each part of a step."""
    with fake_tensors(), PeakMemory([]) as memory:
        recipe = build(config, teacher)
        clip = clip_of(config, recipe.device, world_size=world_size)
        for optimizer in recipe.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)  # of the micro-batch before
            optimizer.step()  # creates the moments
        gc.collect()
        stays, base, tops = persistent(recipe, clip), memory.live, {}

        def done(what: str) -> None:
            tops[what] = memory.peak - base
            if what == "forward":
                tops["kept for backward"] = memory.live - base
            memory.peak = memory.live

        memory.peak = base
        recipe.passes(clip, done)
        recipe.update()
        done("update")
    stays["other"] = base - sum(stays.values())
    return stays, tops


def total(stays: dict[str, int], tops: dict[str, int]) -> int:
    """Peak bytes."""
    return sum(stays.values()) + max(tops.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings of train.py, such as data.height=512")
    stays, tops = count(parser.parse_args().settings)
    for name, size in stays.items():
        print(f"{name:45}{size / GIB:8.3f} GiB")
    print(f"{'together, from step to step':45}{sum(stays.values()) / GIB:8.3f} GiB")
    for name, size in tops.items():
        print(f"{f'  on top, {name}':45}{size / GIB:8.3f} GiB")
    print(f"{'at most':45}{total(stays, tops) / GIB:8.3f} GiB")


if __name__ == "__main__":
    main()
