"""One of two ranks, run as a process by test_gan_ranks.py: steps with a GAN, and steps in which rank 1 alone fails, while
ranks exchange gradients for the adaptive weight."""

from __future__ import annotations

import pickle
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch

from tests.training import quick
from tests.training.faulty_ranks import clips_of, faulty_step, out_of_memory
from vae3d import distributed
from vae3d.training.preflight import PreflightError
from vae3d.training.vae_trainer import VaeTrainer

SOUND = 3
FAULTS = ("backward", "second", "data", "nan", "discriminator")  # a preflight fails in the forward pass


def sound_steps(t: VaeTrainer) -> dict[str, object]:
    """Run the first steps with a larger eps, so that Adam does not amplify rounding errors; returns the state."""
    t.adversary.optimizer.param_groups[0]["eps"] = 0.01
    average = t.adversary.average_gradients

    def average_in_the_buffer() -> torch.Tensor:  # with a new one, a rank without memory for it would stop the others
        with mock.patch.object(torch.Tensor, "new_empty", side_effect=AssertionError("a new buffer")):
            return average()

    t.adversary.average_gradients = average_in_the_buffer
    metrics = [t.train_step(clips_of(t, step)).metrics for step in range(SOUND)]
    weights = {name: tensor.clone() for name, tensor in t.network.state_dict().items()}
    critic = {name: tensor.clone() for name, tensor in t.adversary.discriminator.state_dict().items()}
    return {"metrics": metrics, "weights": weights, "critic": critic, "averages": t.adversary.averages.clone()}


def faulty_steps(t: VaeTrainer, fails: bool) -> dict[str, dict[str, object]]:
    metrics = {}
    for error in FAULTS:
        hooks = []
        if fails and error == "discriminator":  # its own pass, after the exchange of the first micro-batch
            discriminator_criterion = t.adversary.discriminator_criterion
            t.adversary.discriminator_criterion = out_of_memory
            hooks.append(lambda: setattr(t.adversary, "discriminator_criterion", discriminator_criterion))  # noqa: B023
        metrics[error] = faulty_step(t, error, fails)
        for undo in hooks:
            undo()
        metrics[f"after {error}"] = asdict(t.train_step(clips_of(t, t.step)))
    return metrics


def main(folder: Path) -> None:
    """Write rank<N>.pt to `folder`, which has the checked configuration."""
    torch.set_num_threads(1)
    config = pickle.loads((folder / "config.pickle").read_bytes())
    t = quick.trainer(config, folder / "sound", **{"data.batch_size": 2})
    rank = t.accelerator.process_index
    report = {"sound": sound_steps(t)}
    t.log.close()
    t = quick.trainer(config, folder / "faulty", **{"data.batch_size": 4, "trainer.accumulate": 2})
    report["steps"] = faulty_steps(t, fails=rank == 1)
    report["weights"], report["critic"] = t.network.state_dict(), t.adversary.discriminator.state_dict()
    hooks = [t.network.register_forward_pre_hook(out_of_memory)] if rank == 1 else []
    try:
        t.preflight()
    except PreflightError as error:
        report["preflight"] = str(error)
    for hook in hooks:
        hook.remove()
    t.preflight()
    t.log.close()
    torch.save(report, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    with distributed.process_group_scope():
        main(Path(sys.argv[1]))
