"""Train, fine-tune, run and score video autoencoders.

model = vae3d.load("runs/opensora_stage3")              # a run, an export or published weights
video = vae3d.read_video("clip.mp4", num_frames=17)     # video.frames: [1, 3, T, H, W] in [-1, 1]
rec = vae3d.reconstruct(model, video.frames)
vae3d.score(video.frames, rec)                          # {"psnr": ..., "psnr_video": ..., "ssim": ...}
latents = model.encode(video.frames).mode()

`dir(vae3d)` lists everything; docs/python.md shows how to use it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "LatentCodec",
    "Video",
    "VideoAutoencoder",
    "build",
    "from_pretrained",
    "list_models",
    "load",
    "open_codec",
    "push_to_hub",
    "read_video",
    "reconstruct",
    "save",
    "score",
    "write_video",
]

if TYPE_CHECKING:
    from vae3d.api import (
        LatentCodec,
        Video,
        VideoAutoencoder,
        build,
        from_pretrained,
        list_models,
        load,
        open_codec,
        push_to_hub,
        read_video,
        reconstruct,
        save,
        score,
        write_video,
    )


# Names that are not of vae3d.api, which imports what reads and writes videos.
_MODULES = {
    **dict.fromkeys(("build", "list_models", "load", "open_codec", "save"), "vae3d.loading"),
    **dict.fromkeys(("from_pretrained", "push_to_hub"), "vae3d.hub"),
    "LatentCodec": "vae3d.latents.codec",
    "VideoAutoencoder": "vae3d.models.interface",
}


def __getattr__(name: str) -> Any:
    # Imported on demand: torch, which the check of a configuration does not need, and readers, which a model does not.
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, "vae3d.api")), name)
    raise AttributeError(f"module 'vae3d' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
