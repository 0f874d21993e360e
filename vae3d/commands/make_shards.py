"""Write tar shards from any source; see docs/large_data.md. Flags: vae3d.commands.flags."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from vae3d.commands.console import show
from vae3d.data.media import DataError
from vae3d.data.sources.image_folder import open_images_or_source
from vae3d.data.tars.index import INDEX
from vae3d.data.tars.writer import check_broken, entries_of, plan_record, plan_shards, write_shards
from vae3d.io import read_json, write_json
from vae3d.result_folder import has_results, locked
from vae3d.text import byte_text, plural

PLAN = "shards.json"  # what the shards are made of, so that a killed run goes on


def main(args: Namespace) -> None:
    source = open_images_or_source(args.source, args.root)
    table = source.table()
    for note in getattr(source, "notes", ()):
        show(note)
    entries, errors = entries_of(table, shuffle=args.shuffle, with_probe=args.probe)
    for line in check_broken(errors, len(table), args.max_broken):
        show(line, file=sys.stderr)
    if not entries:
        raise DataError(f"{args.source} has no files to write")
    files = len({entry.path for entry in entries})
    if files < len(entries):
        print(f"{len(entries)} rows are parts of {plural(files, 'file')}; each row gets a copy of its file")
    spans = plan_shards(entries, args.size, args.samples)
    with locked(args.out, str(args.out)):
        write_plan(args.out, plan_record(entries, spans))
        shards = write_shards(entries, spans, args.out, args.workers)
    total = sum(shard.stat().st_size for shard in shards)
    print(f"{plural(len(entries), 'sample')}, {byte_text(total)} -> {plural(len(shards), 'shard')} in {args.out}")
    print(f"index -> {args.out / INDEX}; train on them with data=webdataset data.source.path={args.out}")


def write_plan(folder: Path, record: dict[str, Any]) -> None:
    """Write shards.json, or check that the existing one has the same record. Raises DataError."""
    if (folder / PLAN).is_file():
        if read_json(folder / PLAN) != record:
            raise DataError(
                f"{folder} holds shards of other files or settings (see {folder / PLAN}); choose another folder, or "
                "delete it"
            )
    elif has_results(folder):
        raise DataError(f"{folder} is not empty; choose another folder")
    else:
        write_json(folder / PLAN, record)
