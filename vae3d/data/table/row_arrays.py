"""Rows of a source as Arrow columns, with the hashes by which they are chosen and compared.

A row has hashes of its identity and of its facts (see fingerprint.py) and, where no `split` is given, of the name of
its file, which decides what is held out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from vae3d.data.table.file_table import NAMES, TEXT, ArrowMemory, FileTable, take, text_array
from vae3d.data.table.fingerprint import fact_hashes, row_hashes
from vae3d.data.table.parts import path_hash
from vae3d.data.table.rows import NUMBERS, SPLITS, TEXTS
from vae3d.data.table.segments import SEGMENT
from vae3d.seeding import seed_of

LABEL_IS_NUMBER = "label_is_number"  # labels are stored as texts, and hashed as what they were


def schema_of(given: Sequence[str], root: str, with_path: bool = False) -> pa.Schema:
    """given: columns in which a row may have a value. with_path: paths do not follow from root and name."""
    texts = [name for name in TEXTS if name in given or name == "error"]
    fields = [("path", NAMES)] if with_path else []
    fields += [("name", NAMES), *((name, TEXT) for name in texts)]
    fields += [(LABEL_IS_NUMBER, pa.bool_())] if "label" in given else []
    fields += [(name, pa.float64()) for name in (*NUMBERS, *SEGMENT) if name in given]
    fields += [("identity", pa.int64()), ("facts", pa.int64())]  # hashes
    fields += [] if "split" in given else [("file", pa.int64())]
    return pa.schema(fields, {b"root": os.fsencode(root)})


def row_arrays(table: pd.DataFrame, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of a schema, of rows as normalise_rows gives them."""
    arrays: dict[str, pa.Array] = {"name": pa.array([os.fsencode(name) for name in table["name"]], NAMES)}
    for name in schema.names:
        if name == "path":
            arrays[name] = pa.array(list(map(os.fsencode, table["path"])), NAMES)
        elif name == LABEL_IS_NUMBER:
            arrays[name] = pa.array([_is_number(label) for label in table["label"].tolist()], pa.bool_())
        elif name in TEXTS:
            given = table[name].where(table[name].isin(SPLITS), None) if name == "split" else table[name]
            arrays[name] = text_array(given)
        elif name in (*NUMBERS, *SEGMENT):
            arrays[name] = pa.array(table[name].to_numpy(dtype=float))
    if "facts" in schema.names:
        arrays["identity"], arrays["facts"] = pa.array(row_hashes(table)), pa.array(fact_hashes(table))
    if "file" in schema.names:
        arrays["file"] = pa.array([seed_of(name) for name in table["name"]], pa.int64())
    return pa.record_batch([arrays[name] for name in schema.names], schema=schema)


def table_in_memory(table: pd.DataFrame) -> FileTable:
    """The rows of a small source, with the columns of those of a large one."""
    given = [name for name in (*TEXTS, *NUMBERS, *SEGMENT) if table[name].notna().any()]
    rows = pa.Table.from_batches([row_arrays(table, schema_of(given, "", with_path=True))])
    numbers = pa.array(table["row"].to_numpy(np.int64) - 1)  # of the source, from 0
    return FileTable(ArrowMemory(rows.append_column("number", numbers)))


def _is_number(label: Any) -> bool:
    return isinstance(label, int | float | np.number) and not isinstance(label, bool) and label == label


def _number(text: str) -> int | float:
    return int(text) if text.removeprefix("-").isdigit() else float(text)


def with_labels(table: FileTable, rows: np.ndarray) -> pd.DataFrame:
    """table.to_pandas(rows), with those labels as numbers that were numbers, for their hashes."""
    found = table.to_pandas(rows)
    if LABEL_IS_NUMBER in table.base.table.column_names:
        numbers = take(table.base.table[LABEL_IS_NUMBER], rows).to_numpy()
        found.loc[numbers, "label"] = found.loc[numbers, "label"].map(_number)
    return found


def path_hashes(paths: Iterable[str]) -> np.ndarray:
    """[paths] int64, see parts.path_hash."""
    return np.array([path_hash(os.fsencode(path)) for path in paths], np.int64)


def equal_in_a_file(table: FileTable, rows: np.ndarray, hashes: np.ndarray, files: np.ndarray) -> np.ndarray:
    """Hashes of names such that rows of one file have the same, though they name it differently: as file_hashes.
    files: [rows] hashes of the paths."""
    _, file = np.unique(files, return_inverse=True)
    lowest, highest = np.full(len(rows), np.iinfo(np.int64).max), np.full(len(rows), -1)
    np.minimum.at(lowest, file, hashes)
    np.maximum.at(highest, file, hashes)
    several = np.flatnonzero((lowest != highest)[file])
    names: dict[int, str] = {}
    for name, number in zip(table.names(rows[several]), file[several].tolist(), strict=True):
        names[number] = min(name, names.get(number, name))
    hashes = hashes.copy()
    hashes[several] = [seed_of(names[number]) for number in file[several].tolist()]
    return hashes
