"""What a training step of an autoencoder needs: memory, operations and files, counted on shapes alone.

Fake tensors have shapes but no memory, and need no GPU. `debug=dry`, docs/make_needs.py and
scripts/benchmarks/count_sd_vae_memory.py print what `vae_needs` counts.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from vae3d import loading
from vae3d.adversarial.base import NoAdversary, UpdatePhase
from vae3d.adversarial.replay import ReplayBuffer
from vae3d.adversarial.seraena import Seraena
from vae3d.commands import builders
from vae3d.commands.training_data import frame_counts
from vae3d.distributed import reduction_elements
from vae3d.layout import place
from vae3d.models.interface import VideoAutoencoder
from vae3d.optim import adamw
from vae3d.precision import DTYPES
from vae3d.schedules import ALL_ON
from vae3d.training.ema import Ema
from vae3d.training.memory import PeakMemory
from vae3d.training.proximal import Proximal
from vae3d.training.student import build_student, reconstruct
from vae3d.training.teacher import StudentWithProjections
from vae3d.types import ClipBatch

if TYPE_CHECKING:
    from vae3d.config.schema import TrainConfig

BOTH = UpdatePhase(model=True, discriminator=True)


@dataclass(frozen=True)
class Needs:
    """What a rank needs.

    stays: bytes on its device from step to step, by item. parts: bytes on top, at most, in each part of a step. flops:
    of a micro-batch of the longest clips, forward and backward. state, export: bytes of a checkpoint and of an export.
    replay: bytes of Seraena's images, once they are all there: in the rank's host memory, and in every checkpoint.
    host: bytes of other items that stay in host memory instead of on the device.
    """

    stays: dict[str, int]
    parts: dict[str, int]
    flops: float
    state: int
    export: int
    replay: int = 0
    host: dict[str, int] = field(default_factory=dict)

    @property
    def memory(self) -> int:
        """Bytes on the device, at most."""
        return sum(self.stays.values()) + max(self.parts.values())


def vae_needs(
    config: TrainConfig,
    clips: int,
    teacher: Callable[[], nn.Module] | None = None,
    ranks: int = 1,
    size: tuple[int, int, int] | None = None,
) -> Needs:
    """Of the training of an autoencoder on `clips` of the most frames at a time, with every loss on.

    Counts the second micro-batch of a step, when the first one's gradients and the optimizer's moments exist. teacher:
    builds the network that teacher.path would open. ranks: of the run. size: frames, height and width of the clips;
    None: those of `data`, without buckets.
    """
    with fake_tensors(), StepCost([]) as cost:
        step = build(config, teacher, size=size)
        batch = step.noise(clips)
        for optimizer in step.optimizers:
            for parameter in parameters_of(optimizer):
                parameter.grad = torch.zeros_like(parameter)  # of the micro-batch before
            optimizer.step()  # creates the moments
        gc.collect()
        stays, base, parts = step.persistent(batch), cost.live, {}
        stays["other"] = base - sum(stays.values())

        def done(what: str) -> None:
            parts[what] = cost.peak - base
            if what == "forward":
                parts["kept for backward"] = cost.live - base
            cost.peak = cost.live

        cost.peak, cost.flops = base, 0
        step.passes(batch, done)
        flops = cost.flops
        step.update()
        done("update")
        state, export = step.bytes_on_disk()
        replay = step.replay_bytes(clips)
        if ranks > 1:
            stays["averaging over ranks"] = step.reduction_bytes()
    strategy = config.trainer.strategy
    on_host = {"EMA"} if config.trainer.ema.device == "cpu" else set()
    if strategy.name == "deepspeed":
        stays |= {name: stays[name] // ranks for name in ("gradients", "AdamW")}
        offload = (strategy.deepspeed.get("zero_optimization") or {}).get("offload_optimizer") or {}
        on_host |= {"AdamW"} if offload.get("device") == "cpu" else set()
    host = {name: stays.pop(name) for name in sorted(on_host)}
    return Needs(stays, parts, flops, state, export, replay, host)


class TrainingStep:
    """Model, losses, adversary and optimizer of a configuration, built and used as vae3d.training does.

    teacher: the network that teacher.path would open. size: frames, height and width of the largest clips; None: those
    of `data`. Weights of loss networks are still to be loaded; call `prepare` before the first step.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        teacher: nn.Module | None = None,
        size: tuple[int, int, int] | None = None,
    ) -> None:
        self.config, self.device, data = config, device, config.data
        self.frames, self.height, self.width = size or (frame_counts(data).all()[-1], data.height, data.width)
        self.model = place(builders.build_model(config), device)
        self.objective = builders.build_objective(config.loss).to(device)
        uncached = replace(config, teacher=replace(config.teacher, cache=None))  # noise never comes again
        self.distillation = builders.build_distillation(uncached, teacher, self.model)
        self.student, groups = build_student(config, self.model, self.objective, self.distillation, self.frames)
        self.loss_networks = [t.term.network for t in self.objective.terms.values() if hasattr(t.term, "network")]
        self.adversary = loading.instantiate(config.adversary)
        self.optimizer = adamw(groups, config.optim, device)

    def prepare(self) -> None:
        """Build the EMA and the discriminator, as the trainer does before the first step."""
        self.ema = Ema(self.model, **{**asdict(self.config.trainer.ema), "device": "model"})
        self.proximal = Proximal(self.model, self.config.optim.proximal)
        self.adversary.load(self.model, self.device, self.config.run.seed, 0)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] + ([] if isinstance(self.adversary, NoAdversary) else [self.adversary.optimizer])

    def noise(self, clips: int, frames: int | None = None) -> ClipBatch:
        """A micro-batch. frames: of each clip; None: the most."""
        size = (clips, self.model.pixel_channels, frames or self.frames, self.height, self.width)
        return ClipBatch(torch.rand(size, device=self.device) * 2 - 1, torch.arange(clips), ["noise"] * clips)

    def passes(
        self,
        batch: ClipBatch,
        done: Callable[[str], None] = lambda what: None,
        step: int = ALL_ON,
        phase: UpdatePhase = BOTH,
    ) -> None:
        """Forward and backward of a micro-batch. done: called with the name of each part when it ends."""
        with torch.set_grad_enabled(phase.model):
            batch, out = reconstruct(
                self.config, self.student, self.model, self.objective, self.distillation, batch, step
            )
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
        nn.utils.clip_grad_norm_(parameters_of(self.optimizer), self.config.optim.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(0)
        if not isinstance(self.adversary, NoAdversary):
            self.adversary.optimizer.step()
            self.adversary.reset_step()

    def persistent(self, batch: ClipBatch) -> dict[str, int]:
        """Bytes that persist between two micro-batches, by item."""
        model = self.model
        found = {
            "weights": bytes_of(model.parameters()),
            "gradients": bytes_of(p.grad for p in model.parameters()),
            "AdamW": bytes_of(moments(self.optimizer)),
            "EMA": bytes_of(self.ema.shadow.values()),
        }
        if self.proximal.anchor:
            found["initial weights"] = bytes_of(self.proximal.anchor.values())
        if self.distillation is not None:
            found["teacher"] = bytes_of(self.distillation.teacher.parameters())
        if not isinstance(self.adversary, NoAdversary):
            network, optimizer = self.adversary.discriminator, self.adversary.optimizer
            tensors = [*network.parameters(), *network.buffers(), *(p.grad for p in network.parameters())]
            found["discriminator"] = bytes_of([*tensors, *moments(optimizer)])
        in_loss = [x for network in self.loss_networks for x in (*network.parameters(), *network.buffers())]
        return found | {"loss networks": bytes_of(in_loss), "clips": bytes_of([batch.video])}

    def reduction_bytes(self) -> int:
        """Bytes of the buffers in which several ranks average gradients; DeepSpeed's own are not counted."""
        trainer, size = self.config.trainer, 0
        if trainer.strategy.name != "deepspeed":
            size = reduction_elements(parameters_of(self.optimizer)) * DTYPES[trainer.reduce_dtype].itemsize
        if not isinstance(self.adversary, NoAdversary):
            network = self.adversary.discriminator
            statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
            size += reduction_elements([*network.parameters(), *statistics]) * torch.float32.itemsize
        return size

    def bytes_on_disk(self) -> tuple[int, int]:
        """Bytes of a checkpoint's tensors, without a replay, and of an export's."""
        export = bytes_of(self.model.state_dict().values())
        state = export + 2 * bytes_of(parameters_of(self.optimizer)) + bytes_of(self.ema.shadow.values())
        if isinstance(self.student, StudentWithProjections):
            state += bytes_of(self.student.projections.parameters())
        if not isinstance(self.adversary, NoAdversary):
            network = self.adversary.discriminator
            state += bytes_of(network.state_dict().values()) + 2 * bytes_of(network.parameters())
        return state, export

    def replay_bytes(self, clips: int) -> int:
        """Bytes of Seraena's replay on one rank at the end of the run; 0 without Seraena. clips: of a micro-batch."""
        adversary, trainer = self.adversary, self.config.trainer
        if not isinstance(adversary, Seraena):
            return 0
        channels, _, height, width = self.model.latent_shape(self.frames, self.height, self.width)
        pair = ReplayBuffer.bytes_of(3 * adversary.frames * self.height * self.width, channels * height * width)
        images = clips * math.ceil(self.frames / adversary.frames)
        pushed = max(trainer.max_steps - adversary.discriminator_start, 0) * trainer.accumulate * images
        return min(adversary.buffer.capacity(pair), pushed) * pair


def build(
    config: TrainConfig,
    teacher: Callable[[], nn.Module] | None = None,
    device: str = "cpu",
    size: tuple[int, int, int] | None = None,
) -> TrainingStep:
    """A step on fake tensors, or on the meta device, which is faster but has no autocast.

    teacher: builds the network that teacher.path would open. size: see TrainingStep.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[config.teacher.precision])  # since fake parameters cannot be cast later
    try:
        with torch.device(device):
            network = teacher and teacher()
    finally:
        torch.set_default_dtype(default)
    with torch.device(device):
        step = TrainingStep(config, torch.device(device), network, size)
    if device != "meta":
        for network in step.loss_networks:
            give_shapes(network)
    step.prepare()
    return step


class StepCost(PeakMemory):
    """Memory, and floating-point operations: a multiply-add counts as 2. FlopCounterMode counts the same, but its
    hooks on modules keep tensors alive, and fail on the inner gradients of an adversary."""

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__(apart)
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


@contextmanager
def fake_tensors() -> Iterator[None]:
    """New tensors have no memory. Modules stay on the CPU, since parameters without memory cannot be moved."""
    with patch.object(nn.Module, "to", lambda module, *_, **__: module), countable(), FakeTensorMode():
        yield


@contextmanager
def countable() -> Iterator[None]:
    """What shapes alone do not allow is replaced by what costs the same."""
    with (  # by functions, not mocks, which would keep the tensors that they are called with
        patch("vae3d.models.layers.stream_conv._taps_apart", lambda x: False),  # as on a GPU
        patch.object(VideoAutoencoder, "latent_stats", lambda model: {"latents_mean": (), "latents_std": ()}),
        patch.object(ClipBatch, "generators", lambda *_: None),  # which are seeded by the values of positions
        patch.object(Seraena, "_draw_fakes", lambda *_: None),
        patch.object(ReplayBuffer, "gather", lambda buffer, indices, images, contexts: (images, contexts)),
        patch.object(ReplayBuffer, "push", lambda *_: None),
    ):
        yield


def give_shapes(network: nn.Module) -> None:
    """Replace parameters and buffers on the meta device, such as LPIPS's before their file is loaded, by fake ones."""
    for module in network.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            if p.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(p.shape), requires_grad=False))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            if buffer.is_meta:
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of all storages, each counted once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if x is not None}
    return sum(storages.values())


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
