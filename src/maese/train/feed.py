"""The tensors of what goes through the model at once, and on a card, those that come next made while it works.

    feed = Feed(gather, device)
    for batch in feed.batches(groups): …      each group of rows as tensors, where the model is
    feed.expect(groups_of_the_next_step[0])   before the card is waited for

What a batch holds follows from its rows alone, so what was foreseen and does not come is only thrown away. On a
processor nothing is foreseen: there is no other hand to do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from maese.model import load
from maese.tokens.batches import IGNORED, collate, collate_flat, collate_packed

if TYPE_CHECKING:
    from maese.train.session import Session

Batch = dict[str, Any]


def gather(session: Session, chosen: list[Any]) -> Batch:
    """The rows of one group as tensors: without padding where the model takes that, else packed or padded."""
    rows, data, pad = session.data.train, session.recipe.data, load.pad_id(session.tokenizer)
    if session.unpadded:
        return collate_flat([rows[i] for i in chosen], pad)
    if data.packing:
        return collate_packed([[rows[i] for i in packed] for packed in chosen], pad, data.max_length)
    return collate([rows[i] for i in chosen], pad)


def before_learnt(labels_BT: Any) -> Any:
    """The places before learnt tokens, counted over all rows: `[[-100, 5, -100], [-100, -100, 6]]` gives `[0, 4]`."""
    rows, places = (labels_BT[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return rows * labels_BT.shape[1] + places


class Feed:
    """Batches on a device, with the next one in the making (`ahead`, on CUDA) on a thread of its own."""

    def __init__(self, make: Callable[[list[Any]], Batch], device: Any, ahead: bool | None = None) -> None:
        self._make, self._device = make, device
        self._card = device.type == "cuda"
        self._hand = ThreadPoolExecutor(1, "maese-feed") if (self._card if ahead is None else ahead) else None
        self._coming: tuple[list[Any], Future[Batch]] | None = None

    def batches(self, groups: list[list[Any]]) -> Iterator[Batch]:
        """The batch of each group, in order."""
        for i, chosen in enumerate(groups):
            made = self._take(chosen)
            if i + 1 < len(groups):
                self.expect(groups[i + 1])
            # From pinned memory the copy is one more thing in the queue of the card, and nobody waits for it.
            yield {
                name: value.to(self._device, non_blocking=self._card) if hasattr(value, "to") else value
                for name, value in made.items()
            }

    def expect(self, chosen: list[Any]) -> None:
        """Begin with the batch that should be asked for next."""
        if self._hand is not None:
            self._coming = (chosen, self._hand.submit(self._ready, chosen))

    def close(self) -> None:
        """Let go of what nobody will ask for."""
        self._coming = None
        if self._hand is not None:
            self._hand.shutdown(cancel_futures=True)

    def _take(self, chosen: list[Any]) -> Batch:
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == chosen:
            return coming[1].result()
        return self._ready(chosen)

    def _ready(self, chosen: list[Any]) -> Batch:
        batch = self._make(chosen)
        if not self._card:
            return batch
        # What is learnt is looked up here: on the card, its number would have to be waited for.
        batch["kept"] = before_learnt(batch["labels"])
        return {name: value.pin_memory() if hasattr(value, "pin_memory") else value for name, value in batch.items()}
