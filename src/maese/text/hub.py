"""A data set of the hub to rows, through `datasets`: kept on disk, or read as it comes.

    hub_rows(Source(hub="bertin-project/alpaca-spanish"))     (1, {"instruction": …}), (2, …)

A local folder in the form the hub keeps them (`train.jsonl`, parquet files) is opened the same way. No code that comes
with a data set is ever run: `datasets` no longer knows how to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from maese.errors import MaeseError
from maese.recipe import Source, at_home


def hub_rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row with its number from 1. Errors: DATA-22 (not found, or no network), DEP-01 (`datasets` missing)."""
    try:
        from datasets import load_dataset, logging
        from datasets.exceptions import DatasetNotFoundError
        from datasets.utils import disable_progress_bars
    except ImportError:
        raise MaeseError("DEP-01", package="datasets", extra="data") from None
    disable_progress_bars()
    logging.set_verbosity_error()
    name, _, revision = str(source.hub).partition("@")
    folder = at_home(name)
    try:
        found = load_dataset(
            str(folder) if folder.is_dir() else name,
            split=source.part,
            streaming=source.streaming,
            revision=revision or None,
        )
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as problem:
        raise MaeseError("DATA-22", name=name, part=source.part, reason=type(problem).__name__) from None
    rows = itertools.islice(found, source.limit)
    yield from ((i, dict(row)) for i, row in enumerate(rows, 1))
