"""Random weights under the published names, to try and time metrics without the real files.

    python scripts/random_weights.py DIR
    VAE3D_WEIGHTS=DIR VAE3D_ALLOW_UNVERIFIED=1 python eval/eval_common_metric.py ... --metric lpips flolpips rfid

The scores mean nothing, but take as long and as much memory as real ones.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from vae3d.features import inception, lpips, pwcnet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_weights(parser.parse_args().folder)


def write_weights(folder: Path) -> None:
    """Of LPIPS's AlexNet, PWC-Net and FID's Inception-v3."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        alexnet = torchvision.models.alexnet(weights=None).features.state_dict()
    pwc = pwcnet.PWCNet().state_dict()
    shapes = {
        lpips.TRUNKS["alex"][1]: {f"features.{key}": tensor for key, tensor in alexnet.items()},
        pwcnet.FILES[1]: {
            f"{nvlabs}.{kind}": pwc[f"{own}.{kind}"]
            for own, _, nvlabs in pwcnet.published_names()
            for kind in ("weight", "bias")
        },
        inception.FILE: inception.InceptionV3().state_dict(),
    }
    rng = torch.Generator().manual_seed(0)
    for name, state in shapes.items():
        torch.save({key: random_weight(key, tensor, rng) for key, tensor in state.items()}, folder / name)


def random_weight(key: str, like: Tensor, rng: torch.Generator) -> Tensor:
    """Such that activations keep their scale from layer to layer."""
    if like.ndim > 1:
        return torch.randn(like.shape, generator=rng) * math.sqrt(2 / math.prod(like.shape[1:]))
    return torch.full(like.shape, float(key.endswith(("bn.weight", "running_var"))))


if __name__ == "__main__":
    main()
