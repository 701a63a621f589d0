"""A table of messages that answer one another (OpenAssistant's) to a question and its best answer a row.

    pairs([(1, {"message_id": "a", "parent_id": None, "role": "prompter", "text": "¿Qué es una pila?", "lang": "es"}),
           (2, {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "…", "rank": 0, "lang": "es"})])
    (2, {"prompt": "¿Qué es una pila?", "completion": "…", "lang": "es"})

Rows of any other kind go by as they are. Köpf et al. 2023, arXiv 2304.07327.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

NEEDED = {"message_id", "parent_id", "role", "text"}
Row = tuple[int, dict[str, Any]]


def pairs(rows: Iterable[Row]) -> Iterator[Row]:
    """Each answer that was judged the best of its question, or the only one, with that question, wherever it came.

    Those that answer a question which comes later in the table wait for it.
    """
    asked: dict[str, str] = {}
    waiting: dict[str, list[Row]] = {}
    for line, row in rows:
        if not row.keys() >= NEEDED:
            yield line, row
        elif row["role"] == "prompter":
            asked[row["message_id"]] = row["text"]
            yield from (_pair(row["text"], each) for each in waiting.pop(row["message_id"], []))
        elif row.get("rank") in (None, 0) and not row.get("deleted"):
            if row["parent_id"] in asked:
                yield _pair(asked[row["parent_id"]], (line, row))
            else:
                waiting.setdefault(row["parent_id"], []).append((line, row))


def _pair(question: str, answer: Row) -> Row:
    line, row = answer
    return line, {"prompt": question, "completion": row["text"], "lang": row.get("lang", "")}
