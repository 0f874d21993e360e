"""Calls vae3d's functions for the hub as test_hub.py asks for, in a process with an environment of its own.

Reads a line of JSON, [function, arguments], and prints the result as one: {"url": ...}, {"weights": a hash, "class":
...} or {"error": ...}. huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from huggingface_hub import constants, snapshot_download
from torch import Tensor

import vae3d
from vae3d.errors import UserError


def digest(state: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def push(source: str, **arguments: Any) -> dict[str, str]:
    return {"url": vae3d.load(source).push_to_hub(**arguments)}


def pull(**arguments: Any) -> dict[str, str]:
    model = vae3d.VideoAutoencoder.from_pretrained(**arguments)
    assert isinstance(model, vae3d.VideoAutoencoder)
    return {"weights": digest(model.state_dict()), "class": type(model).__name__}


def load(path: str) -> dict[str, str]:
    return {"weights": digest(vae3d.load(path).state_dict())}


def download(repository: str, pattern: str) -> dict[str, str]:
    """As `hf download REPOSITORY --include PATTERN` does."""
    snapshot_download(repository, allow_patterns=pattern)
    return {}


def offline(on: bool) -> dict[str, str]:
    """What HF_HUB_OFFLINE=1 sets when huggingface_hub is imported."""
    constants.HF_HUB_OFFLINE = on
    return {}


CALLS = {"push": push, "pull": pull, "load": load, "download": download, "offline": offline}


def main() -> None:
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            function, arguments = json.loads(line)
            try:
                answer = CALLS[function](**arguments)
            except UserError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
