"""Count the memory of a training step of the SD VAE with its GAN, item by item, without running it.

    python scripts/benchmarks/count_sd_vae_memory.py                                      # 256 pixels
    python scripts/benchmarks/count_sd_vae_memory.py data.height=512 data.width=512
    python scripts/benchmarks/count_sd_vae_memory.py adversary=none model.gradient_checkpointing=false

Arguments are settings as train.py takes them, on top of RECIPE. Fake tensors: shapes only, no memory, no GPU. What is
counted is a step with every loss and the discriminator on, its second micro-batch, when gradients of the first and
moments of a step before are there. Not counted: the CUDA context and libraries (about 0.5 GiB), what cuDNN takes to
work in, and what the allocator holds between blocks; and a validation, which keeps nothing for backward, but whose rFID
has a network of 0.1 GiB.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import hydra
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent))

from count_costs import give_shapes
from count_wan_memory import PeakMemory

from vae3d import loading, precision
from vae3d.adversarial.base import NoAdversary
from vae3d.commands import train
from vae3d.config.check import read
from vae3d.config.schema import CONF, TrainConfig
from vae3d.models.base import attach_decoder
from vae3d.schedules import ALL_ON
from vae3d.training.ema import Ema
from vae3d.training.freeze import set_mode, train_parts
from vae3d.types import Clip

RECIPE = ("experiment=sd_vae_gan", "data.source.path=none")
GIB = 2**30


def composed(overrides: Iterable[str]) -> TrainConfig:
    """The settings of RECIPE and `overrides`."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return read(hydra.compose("train", [*RECIPE, *overrides]), TrainConfig)[0]


class Recipe:
    """What a configuration trains with, on one device, as vae3d.training.vae_trainer makes and uses it."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.dtype = precision.autocast_dtype(config.trainer.precision)
        self.model = loading.instantiate(config.model).to(device)
        groups = train_parts(self.model, config.stage.train)
        set_mode(self.model, config.stage.train)
        self.objective = train.objective(config.loss)
        self.loss_networks = [t.term.network for t in self.objective.terms.values() if hasattr(t.term, "network")]
        self.adversary = loading.instantiate(config.adversary)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=tuple(config.optim.betas), fused=fused)

    def prepare(self) -> None:
        """What the trainer makes before the first step, once the networks are as they are to be."""
        self.ema = Ema(self.model, **asdict(self.config.trainer.ema))
        self.adversary.load(self.model, self.device, self.config.run.seed, 0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def passes(self, clip: Clip, done: Callable[[str], None] = lambda what: None, step: int = ALL_ON) -> None:
        """Forward and backward passes of a micro-batch. done: is told of each as it ends."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            out = self.model(clip.video, pixels=self.objective.needs_pixels)
        out = attach_decoder(out, self.model)
        done("forward")
        loss, _ = self.objective(clip, out, step)
        adversarial, _ = self.adversary.generator_loss(clip, out, loss, step)
        done("losses")
        ((loss + adversarial) / self.config.trainer.accumulate).backward()
        del loss, adversarial
        done("backward")
        if not isinstance(self.adversary, NoAdversary):
            judged, _ = self.adversary.discriminator_loss(clip, out, step)
            (judged / self.config.trainer.accumulate).backward()
            done("discriminator")

    def update(self) -> None:
        """The networks' updates, without what ranks ask of each other."""
        nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(0)
        if not isinstance(self.adversary, NoAdversary):
            self.adversary.optimizer.step()
            self.adversary.reset_step()


def clip_of(config: TrainConfig, device: torch.device) -> Clip:
    """A micro-batch of noise on one rank."""
    data = config.data
    size = (data.batch_size // config.trainer.accumulate, 3, data.frames.max, data.height, data.width)
    return Clip(torch.rand(size, device=device) * 2 - 1, torch.arange(size[0]), ["noise"] * size[0])


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Of all storages, each once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if x is not None}
    return sum(storages.values())


def standing(recipe: Recipe, clip: Clip) -> dict[str, int]:
    """Bytes of what is there from step to step, between two micro-batches."""
    model = recipe.model
    found = {
        "weights": bytes_of(model.parameters()),
        "gradients": bytes_of(p.grad for p in model.parameters()),
        "moments of AdamW": bytes_of(moments(recipe.optimizer)),
        "averaged weights (EMA)": bytes_of(recipe.ema.shadow.values()),
    }
    if not isinstance(recipe.adversary, NoAdversary):
        network, optimizer = recipe.adversary.discriminator, recipe.adversary.optimizer
        tensors = [*network.parameters(), *network.buffers(), *(p.grad for p in network.parameters())]
        found["discriminator, its gradients and moments"] = bytes_of([*tensors, *moments(optimizer)])
    in_loss = [x for network in recipe.loss_networks for x in (*network.parameters(), *network.buffers())]
    return found | {"LPIPS": bytes_of(in_loss), "clip": bytes_of([clip.video])}


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]


def count(overrides: Iterable[str] = ()) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of every item that stays; and what comes on top at most, in each part of a step."""
    config, device = composed(overrides), torch.device("cpu")
    # Fake parameters cannot be moved, and are where they should be.
    with patch.object(nn.Module, "to", lambda module, *_: module), FakeTensorMode(), PeakMemory([]) as memory:
        recipe = Recipe(config, device)
        for network in recipe.loss_networks:
            give_shapes(network)
        recipe.prepare()
        clip = clip_of(config, device)
        recipe.passes(clip)
        recipe.update()  # makes the moments
        recipe.passes(clip)  # makes gradients, which stay
        gc.collect()
        stays, base, tops = standing(recipe, clip), memory.live, {}

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
    """The most that is alive at once."""
    return sum(stays.values()) + max(tops.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="as of train.py, such as data.height=512")
    stays, tops = count(parser.parse_args().settings)
    for name, size in stays.items():
        print(f"{name:45}{size / GIB:8.3f} GiB")
    print(f"{'together, from step to step':45}{sum(stays.values()) / GIB:8.3f} GiB")
    for name, size in tops.items():
        print(f"{f'  on top, {name}':45}{size / GIB:8.3f} GiB")
    print(f"{'at most':45}{total(stays, tops) / GIB:8.3f} GiB")


if __name__ == "__main__":
    main()
