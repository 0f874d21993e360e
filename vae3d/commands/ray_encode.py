"""Encode a data set into a latent cache on a Ray cluster, with Ray Data; needs the extra `ray`. See docs/latents.md.

    import vae3d.commands.ray_encode
    from vae3d.config.latents import EncodeConfig

    config = EncodeConfig(checkpoint="Wan2.1_VAE.pth", source="videos.csv", cache="latents", frames=17, ...)
    vae3d.commands.ray_encode.encode(config, actors=64, gpus=1, cpus=8)

The cache has the bytes that `vae3d encode` writes, and processes of that command may help.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vae3d.commands.encode import open_encoder, open_job
from vae3d.distributed import inference_device
from vae3d.errors import UserError
from vae3d.latents.cache_storage import read_meta
from vae3d.latents.encode import begin, discard_unusable, encode_shards, finish
from vae3d.latents.shards import CacheError

if TYPE_CHECKING:
    import numpy as np

    from vae3d.config.latents import EncodeConfig

BLOCKS = 16  # per actor: so many parts of the work Ray hands out one by one


class ShardEncoder:
    """An actor of Ray Data: loads the autoencoder once, then encodes the shards that it is given, with map_batches.

    folder: the working folder, to which relative paths in `config` refer. It and those must exist on every node.
    """

    def __init__(self, config: EncodeConfig, folder: str) -> None:
        os.chdir(folder)
        self.job = open_job(config, open_encoder(config, inference_device(config.device)))
        self.claims = self.job.storage.claims(config.stale)
        self.claims.__enter__()  # for the life of the actor
        self.digest: str | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """{"id": numbers of shards} -> the same, once they are complete, and "error": why they are not, or ""."""
        numbers = batch["id"].tolist()
        try:
            if self.digest is None:
                self.digest = begin(self.job, self.claims)
            discard_unusable(self.job, numbers, self.digest)
            encode_shards(self.job, numbers, self.digest, self.claims, quiet=True, wait=True)
        except UserError as error:  # as a value: Ray would show its own frames, and drop the type
            return {"id": numbers, "error": [str(error)] * len(numbers)}
        return {"id": numbers, "error": [""] * len(numbers)}


def encode(config: EncodeConfig, actors: int = 1, gpus: float = 0, cpus: float = 1) -> None:
    """Write the latent cache that `config` describes, or resume it, on the cluster that Ray is connected to.

    Ray hands the shards to `actors` processes with so many GPUs and CPUs each (readers, `workers`, included), and to
    others once a node is lost. All nodes must share the cache's folder. Raises CacheError as encode_cache does.
    """
    import ray
    from ray.data import ActorPoolStrategy

    job = open_job(config)
    # Not ray.data.range, whose tasks would wait forever where the actors have all CPUs.
    blocks = min(job.shards, BLOCKS * actors)
    numbers = ray.data.from_items([{"id": number} for number in range(job.shards)], override_num_blocks=blocks)
    options: dict[str, Any] = {"num_gpus": gpus} if gpus else {}
    encoded = numbers.map_batches(
        ShardEncoder,
        fn_constructor_args=(config, os.getcwd()),
        batch_size=1,
        compute=ActorPoolStrategy(size=min(actors, job.shards)),
        num_cpus=cpus,
        **options,
    )
    for row in encoded.iter_rows():
        if row["error"]:
            raise CacheError(row["error"])
    with job.storage.claims(config.stale) as claims:
        finish(job, read_meta(job.storage)["digest"], claims)
