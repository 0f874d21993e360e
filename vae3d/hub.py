"""Models on the Hugging Face hub: download with the hub's cache, upload with a model card."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from vae3d import __version__
from vae3d.errors import UserError
from vae3d.io import write_text
from vae3d.loading import load, save
from vae3d.models.interface import VideoAutoencoder

# Weights and configurations, without the pictures and the code of a repository. Of a pipeline that is all of its parts.
WEIGHTS = ("*.safetensors", "*.pth", "*.bin", "*.json", "*.yaml")
CARD = """---
library_name: vae3d
tags: [video-autoencoder, vae]
{license}---

# {name}

A video autoencoder, {kind}, exported by vae3d {version}.

| | |
|---|---|
| parameters | {parameters:.1f} M |
| latents | {channels} channels, {time} x {space} x {space} |

```python
import vae3d

model = vae3d.from_pretrained("{repository}")
video = vae3d.read_video("clip.mp4")
rec = vae3d.reconstruct(model, video.frames)
```
"""


def from_pretrained(path: str | Path, *, revision: str | None = None, **changes: Any) -> VideoAutoencoder:
    """Load a model from a folder, a file or a repository of the hub, in eval mode, fp32, on the CPU.

    path: as for `load`, or `owner/name` on the hub, which is downloaded into the hub's cache; HF_HUB_OFFLINE=1 uses
    the cache alone. changes: see `load`. Raises CheckpointError, and UserError for a repository that cannot be had.
    """
    if os.path.exists(path):
        return load(path, **changes)
    try:
        folder = snapshot_download(str(path), revision=revision, allow_patterns=list(WEIGHTS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: is no file or folder here, and the hub does not give it: {reason}") from error
    return load(folder, **changes)


def push_to_hub(
    model: VideoAutoencoder, repository: str, *, private: bool = False, license: str | None = None, message: str = ""
) -> str:
    """Upload a model with a model card; returns its URL. Log in with `hf auth login` before.

    repository: owner/name; made if it does not exist. license: for the card, such as mit.
    Raises UserError if the hub refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        write_text(Path(folder) / "README.md", model_card(model, repository, license))
        api = HfApi()
        try:
            url = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message or f"Upload with vae3d {__version__}"
            )
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
            raise UserError(f"{repository}: the hub does not take it: {str(error).strip().splitlines()[0]}") from error
    return str(url)


def model_card(model: VideoAutoencoder, repository: str, license: str | None = None) -> str:
    """The README.md of a repository."""
    spec = model.spec
    return CARD.format(
        license=f"license: {license}\n" if license else "",
        name=repository.rpartition("/")[2],
        repository=repository,
        kind=type(model).__name__,
        version=__version__,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        channels=spec.channels,
        time=spec.time_stride,
        space=spec.space_stride,
    )
