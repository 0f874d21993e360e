"""Write random weights under the published names, to try and time metrics without the real files.

    python scripts/benchmarks/random_weights.py DIR
    VAE3D_WEIGHTS=DIR VAE3D_ALLOW_UNVERIFIED=1 vae3d eval ... --metric lpips flolpips rfid

The scores are meaningless, but cost the same time and memory.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from vae3d.pretrained import i3d, inception, lpips, pwcnet, raft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_weights(parser.parse_args().folder, *SHAPES)


def write_weights(folder: Path, *networks: str) -> None:
    """Write the files of these networks, keys of SHAPES."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(0)
    for network in networks:
        file, shapes = SHAPES[network]()
        torch.save({key: random_weight(key, tensor, rng) for key, tensor in shapes.items()}, folder / file)


def trunk(net: str) -> tuple[str, dict[str, Tensor]]:
    """File name of an LPIPS trunk, and tensors of the shapes in it."""
    builder, file, _ = lpips.TRUNKS[net]
    with torch.device("meta"):
        features = getattr(torchvision.models, builder)(weights=None).features
    return file, {f"features.{key}": tensor for key, tensor in features.state_dict().items()}


def pwc() -> tuple[str, dict[str, Tensor]]:
    own = pwcnet.PWCNet().state_dict()
    nvlabs = pwcnet.published_layouts()[-1]
    return pwcnet.FILES[1], {name: own[ours] for name, ours in nvlabs.items()}


def fid() -> tuple[str, dict[str, Tensor]]:
    return inception.FILE, inception.InceptionV3().network.state_dict()


def flow(net: str) -> tuple[str, dict[str, Tensor]]:
    with torch.device("meta"):
        network = getattr(torchvision.models.optical_flow, net)(weights=None)
    return raft.FILES[net], network.state_dict()


def kinetics() -> tuple[str, dict[str, Tensor]]:
    return i3d.STATE_DICT, i3d.I3D(eps=1e-5).state_dict()


SHAPES = {
    "alex": partial(trunk, "alex"),
    "vgg": partial(trunk, "vgg"),
    "pwc": pwc,
    "raft_large": partial(flow, "raft_large"),
    "raft_small": partial(flow, "raft_small"),
    "inception": fid,
    "i3d": kinetics,
}


def random_weight(key: str, like: Tensor, rng: torch.Generator) -> Tensor:
    """Random values that keep the scale of activations from layer to layer."""
    if like.ndim > 1:
        return torch.randn(like.shape, generator=rng) * math.sqrt(2 / math.prod(like.shape[1:]))
    return torch.full(like.shape, float(key.endswith(("bn.weight", "running_var"))))


if __name__ == "__main__":
    main()
