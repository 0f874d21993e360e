"""Models on the Hugging Face hub: download with the hub's cache, upload with a model card."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vae3d import __version__
from vae3d.checkpoints.formats import CheckpointError
from vae3d.checkpoints.location import EXPORT_CONFIG, cached_repository, exists, find_weights, halves
from vae3d.checkpoints.taehv import INFO_FILE
from vae3d.errors import UserError
from vae3d.io import write_text
from vae3d.loading import load, save
from vae3d.models.interface import VideoAutoencoder
from vae3d.weight_files import read_index

log = logging.getLogger("vae3d")
# httpx's error, which the hub's errors and those of a broken connection are; before huggingface_hub 1.0 an OSError.
HTTP_ERROR = HfHubHTTPError.__mro__[1]
HUB_ERRORS = (HTTP_ERROR, HFValidationError, OSError)
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


def from_pretrained(
    path: str | Path,
    *,
    revision: str | None = None,
    filename: str | None = None,
    token: str | None = None,
    **changes: Any,
) -> VideoAutoencoder:
    """Load a model from a folder, a file or a repository of the Hugging Face hub, in eval mode, fp32, on the CPU.

        model = vae3d.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")                 # of a pipeline only the VAE
        model = vae3d.from_pretrained("owner/many", filename="vae/wan_vae.safetensors")   # one of several

    path: as for `load`, or `owner/name` on the hub, of which the files of the autoencoder are downloaded, once, into
    the hub's cache (HF_HOME). HF_HUB_OFFLINE=1 uses the cache alone. revision: a branch, tag or commit. filename: a
    file or a folder in the repository. token: for private and gated repositories; by default HF_TOKEN, or that of
    `hf auth login`. changes: see `load`.
    Raises CheckpointError, and UserError for a repository that cannot be had or holds no autoencoder.
    """
    if exists(path):
        if revision is not None or filename is not None:
            raise UserError(f"{path} is here; revision and filename are for repositories of the hub")
        return load(path, **changes)
    return load(download(str(path), revision, filename, token), **changes)


def push_to_hub(
    model: VideoAutoencoder,
    repository: str,
    *,
    private: bool = False,
    license: str | None = None,
    message: str = "",
    token: str | None = None,
) -> str:
    """Upload a model with a model card; returns its URL.

        vae3d.push_to_hub(model, "owner/name", license="mit")

    repository: owner/name; made if it does not exist. A README.md that is there stays. private: of a new repository.
    license: for the card, such as mit. message: of the commit. token: one that may write; by default HF_TOKEN, or that
    of `hf auth login`. Raises UserError if the hub does not take it.
    """
    if repository.count("/") != 1:
        raise UserError(f"{repository!r} is no name of a repository; give owner/name")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        write_text(Path(folder) / "README.md", model_card(model, repository, license))
        try:
            url = api.create_repo(repository, private=private, exist_ok=True)
            keep_card = api.file_exists(repository, "README.md")
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                ignore_patterns=["README.md"] if keep_card else None,
                commit_message=message or f"Upload with vae3d {__version__}",
            )
        except (*HUB_ERRORS, ValueError, RuntimeError) as error:  # of the card's license; of a broken upload
            raise UserError(f"{repository}: was not uploaded: {reason(error)}") from error
    if keep_card:
        log.info("%s keeps the README.md that it has", repository)
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


def download(
    repository: str, revision: str | None = None, filename: str | None = None, token: str | None = None
) -> Path:
    """The weight file of the autoencoder in `repository`, in the hub's cache, beside what `load` reads with it.

    Without a connection the cached files are used. Raises UserError as from_pretrained does.
    """
    if repository.count("/") != 1:
        raise UserError(f"{repository}: no such file or folder; a model on the hub is called owner/name")
    api = HfApi(token=token)
    try:
        names = [file.rfilename for file in api.model_info(repository, revision=revision).siblings or ()]
    except HUB_ERRORS as error:
        if isinstance(error, HFValidationError):
            raise UserError(f"{repository}: is no file or folder here, nor the name of a repository") from error
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise UserError(f"{repository}: is no file or folder here, and the hub says: {reason(error)}") from error
        folder = cached_repository(repository, revision)
        if folder is None:
            raise UserError(
                f"{repository}: is no file or folder here, not in the hub's cache, and the hub cannot be asked: "
                f"{reason(error)}; on a connected machine run hf download {repository}, or vae3d.from_pretrained, and "
                "copy the cache, ~/.cache/huggingface or HF_HOME"
            ) from error
        log.info("%s: the hub cannot be asked (%s); using %s", repository, reason(error), folder)
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        return folder / choose(names, repository, filename)
    weights = choose(names, repository, filename)
    beside = PurePosixPath(weights)
    wanted = {"config.json", EXPORT_CONFIG, INFO_FILE, f"{beside.stem}.json"}
    wanted |= {half.name for half in halves(Path(weights))}
    try:
        # The weights last, so that a cache with weights has the rest, too.
        for name in sorted(wanted - {beside.name}):
            if (path := str(beside.with_name(name))) in names:
                api.hf_hub_download(repository, path, revision=revision)
        file = Path(api.hf_hub_download(repository, weights, revision=revision))
        if weights.endswith(".json"):  # an index of shards
            shards = {str(beside.parent / name) for name in set(read_index(file).values())}
            for shard in sorted(shards.intersection(names)):  # `load` names those that are missing
                api.hf_hub_download(repository, shard, revision=revision)
    except HUB_ERRORS as error:
        raise UserError(f"{repository}: cannot be downloaded: {reason(error)}") from error
    return file


def choose(names: Iterable[str], repository: str, filename: str | None = None) -> str:
    """The name of the weight file that `load` would take from a folder with files of these names.

    filename: of a file or a folder among them. Raises UserError if there is none, or several.
    """
    if filename is not None and not _is_inside(filename):
        raise UserError(f"filename is {filename!r}; give the name of a file or a folder in {repository}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, repository)
        for name in names:
            if _is_inside(name):
                with suppress(OSError, ValueError):  # names that no file has here, such as too long ones
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
                    (root / name).touch()
        try:
            return find_weights(root / (filename or "")).relative_to(root).as_posix()
        except CheckpointError as error:
            hint = "" if filename else "; filename= names a file or a folder of the repository"
            raise UserError(f"{str(error).replace(f'{folder}/', '')}{hint}") from None


def _is_inside(name: str) -> bool:
    """Whether the path `name` stays in its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def reason(error: BaseException) -> str:
    """What went wrong with the hub, and how to fix it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "log in with `hf auth login`, or give token="
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 is set"
    if isinstance(error, GatedRepoError):
        return f"the repository is gated: ask for access on its page, then {login}"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision"
    if status == 401:
        return f"there is no such repository, or it is private and the token does not open it: {login}"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository"
    if status == 403:
        return f"the token does not permit it: {login}, one that may write there"
    lines = [line for line in str(error.__cause__ or error).strip().splitlines() if line]
    return lines[0] if lines else type(error).__name__
