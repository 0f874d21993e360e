"""Fetch the pretrained networks that losses and metrics need; for machines with a connection, without torch.

    python scripts/fetch_weights.py                                    # list them, and which are here
    python scripts/fetch_weights.py vgg16-397923af.pth --dest DIR      # fetch one (or `all`) and verify it
    python scripts/fetch_weights.py all --dest DIR --check             # verify what is in DIR, offline

Then export VAE3D_WEIGHTS=DIR where they are used.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a login node need not have the project installed

from vae3d.weights import FILES, WeightFile, WeightsMissing, search_path, verify


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of {' '.join(FILES)}")
    parser.add_argument("--dest", type=Path, default=search_path()[0], help="folder; default %(default)s")
    parser.add_argument("--check", action="store_true", help="only verify, fetch nothing")
    parser.add_argument("--mirror", help="fetch from this address, file names appended, instead of the original ones")
    args = parser.parse_args(argv)

    unknown = [name for name in args.names if name not in FILES and name != "all"]
    if unknown:
        print(f"error: unknown file {', '.join(unknown)}; there are {', '.join(FILES)}", file=sys.stderr)
        return 2
    if not args.names:
        for file in FILES.values():
            here = next((str(d / file.name) for d in search_path() if (d / file.name).is_file()), "not here")
            print(f"{file.name}  {file.size:,} bytes  {file.licence}\n  {file.used_for}\n  {here}")
        return 0
    wanted = list(FILES.values()) if "all" in args.names else [FILES[name] for name in args.names]
    return max(handle(file, args.dest, args.check, args.mirror) for file in wanted)


def handle(file: WeightFile, folder: Path, only_check: bool, mirror: str | None) -> int:
    """Verify or fetch one file; exit status."""
    path = folder / file.name
    try:
        if not path.is_file() and only_check:
            raise WeightsMissing(f"{path}: not there")
        if not path.is_file():
            fetch(f"{mirror.rstrip('/')}/{file.name}" if mirror else file.url, path, file)
        verify(path, file)
    except (WeightsMissing, urllib.error.URLError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: verified ({file.licence})")
    return 0


def fetch(url: str, path: Path, file: WeightFile) -> None:
    """Download to path, going on where an interrupted download stopped; the name appears when the hash is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    have = partial.stat().st_size if partial.is_file() else 0
    if have < file.size:
        download(url, partial, have, file)
    try:
        verify(partial, file)
    except WeightsMissing:
        partial.unlink()  # what is wrong cannot be continued
        raise
    partial.rename(path)


def download(url: str, partial: Path, have: int, file: WeightFile) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = response.status == 206
        done = have if resumed else 0
        with partial.open("ab" if resumed else "wb") as stream:
            while block := response.read(1 << 20):
                stream.write(block)
                done += len(block)
                print(f"\r{file.name}  {done / file.size:4.0%}", end="", file=sys.stderr)
    print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
