"""Train, fine-tune, run and score video autoencoders.

model = vae3d.build("temporal_vae", "model.temporal.channels=32")   # from a config name and overrides
model = vae3d.load("runs/opensora_stage3")                          # from a run, an export or published weights
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["build", "load"]


def __getattr__(name: str) -> Any:
    # Imported on demand: the configuration modules must not pull in torch.
    if name in __all__:
        from vae3d import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'vae3d' has no attribute {name!r}")
