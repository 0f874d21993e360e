"""Train, fine-tune, run and score video autoencoders.

model = vae3d.build("temporal_vae", "model.temporal.channels=32")   # random weights
model = vae3d.load("runs/opensora_stage3")                          # a run, an export or published weights
latents = model.encode(video).mode()                                # video: [B, 3, T, H, W] in [-1, 1]
reconstruction = model.decode(latents, num_frames=video.shape[2])
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["build", "load"]


def __getattr__(name: str) -> Any:
    # Imported on demand, since it imports torch, which the check of a configuration does not need.
    if name in __all__:
        from vae3d import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'vae3d' has no attribute {name!r}")
