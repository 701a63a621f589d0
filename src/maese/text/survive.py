"""Items to items with the reason each is left out for: rules first, then what repeats an earlier one.

    for item, why in survivors(items, ["length"], near=True): …      why is None for those that stay

The reasons are those of `clean`, `duplicate` (the same as one before but for case and spaces) and `near_duplicate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from maese.text.clean import reason
from maese.text.dedup import Duplicates, exact_key, whole
from maese.text.record import Conversation, Document

Item = Document | Conversation


def survivors(
    items: Iterable[Item], rules: list[str], near: bool = False, duplicates: bool = True
) -> Iterator[tuple[Item, str | None]]:
    """Every item in order with its reason, None when it stays. A dropped item never makes another a duplicate.

    With `near`, items are gone through twice, because a later text may show that two earlier ones are of one group;
    what can only be gone through once is held in memory.
    """
    if near and duplicates:
        yield from _near(items, rules)
        return
    seen = set[str]()
    for item in items:
        why = reason(item, rules)
        if why is None and duplicates:
            key = exact_key(whole(item))
            why = "duplicate" if key in seen else None
            seen.add(key)
        yield item, why


def _near(items: Iterable[Item], rules: list[str]) -> Iterator[tuple[Item, str | None]]:
    if iter(items) is items:
        items = list(items)
    seen, ruled = Duplicates(), dict[int, str]()
    for number, item in enumerate(items):
        if why := reason(item, rules):
            ruled[number] = why
        else:
            seen.add(str(number), whole(item))
    repeated = seen.reasons()
    for number, item in enumerate(items):
        yield item, ruled.get(number) or repeated.get(str(number))
