"""The same text through an encoder and a decoder of the same size: what each learns, and what it is for.

    found = study(rows, labelled, tokenizer, Study(steps=200))

An encoder (BERT: Devlin et al. 2018, arXiv 1810.04805) sees a whole sentence with holes in it and fills them; a
decoder (GPT: Radford et al. 2018) sees only what came before and goes on. Both here have the same layers, width and
heads, read the same rows in the same order for as many steps, and are measured on rows neither has read.

A study of minutes, so its loop keeps no checkpoint and is not that of the trainings: those are decoders.

B rows of T tokens, D width.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from maese.errors import MaeseError
from maese.evaluate.likelihood import loss_sum
from maese.model.load import quiet
from maese.recipe import Train
from maese.tokens.batches import batches
from maese.train.optim import optimizer, rate

KINDS = ("encoder", "decoder")
MASKED = 0.15  # of the tokens: of those, eight in ten are hidden, one is another word, one is left as it is
FOLLOWED = 24  # tokens each writes after an opening
Labelled = Sequence[tuple[str, str]]  # text, class


@dataclass(frozen=True)
class Study:
    """Size and length of the study; the defaults take a minute or two on two cores."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    rows: int = 16  # in a step
    steps: int = 300
    lr: float = 1e-3
    seed: int = 42


@dataclass(frozen=True)
class Held:
    """What neither model reads: rows, and where each has a hole."""

    ids_BT: Any
    holes_BT: Any


def study(
    texts: Sequence[str], labelled: Labelled, tokenizer: Any, settings: Study, opening: str = "En un lugar",
    tell: Callable[[str, int], object] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train both on the texts and measure both; figures, curves and what each wrote, as plain data.

    `labelled` are texts with their class, for the probes; `tell(kind, step)` hears of the steps.
    """
    import torch

    quiet()
    torch.manual_seed(settings.seed)
    mixed = list(texts)  # the last tenth must not be all of one source
    random.Random(settings.seed).shuffle(mixed)
    learnt_NT, held_NT = _rows(mixed, tokenizer, settings.context)
    hole = len(tokenizer)  # an id that no text has
    holes = torch.rand(held_NT.shape, generator=torch.Generator().manual_seed(settings.seed)) < MASKED
    held = Held(held_NT, holes)
    found: dict[str, Any] = {"settings": asdict(settings), "rows": [len(learnt_NT), len(held_NT)], "opening": opening}
    for kind in KINDS:
        model = build(kind, hole + 1, settings)
        began = time.monotonic()
        curve = learn(model, loss_of(kind, hole), learnt_NT, settings, partial(tell, kind) if tell else None)
        seconds = time.monotonic() - began
        found[kind] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": seconds,
            "loss": curve,
            "hole_accuracy": hole_accuracy(kind, model, held, hole),
            "perplexity": perplexity(model, held) if kind == "decoder" else None,
            "similarity": similarity(model, held.ids_BT),
            "probe": probe(model, labelled, tokenizer, settings),
            "wrote": write(kind, model, tokenizer, opening, hole, settings.context),
        }
        # Last, as it changes the model.
        found[kind]["probe_tuned"] = probe(model, labelled, tokenizer, settings, tuned=True)
    found["classes"] = sorted({label for _, label in labelled})
    return found


def build(kind: str, vocabulary: int, settings: Study) -> Any:
    """A model of the size that the settings say, that knows nothing: the same body, and the head that each needs."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(settings.seed)
    s = settings
    if kind == "encoder":
        return BertForMaskedLM(
            BertConfig(
                vocab_size=vocabulary, hidden_size=s.width, num_hidden_layers=s.layers, num_attention_heads=s.heads,
                intermediate_size=4 * s.width, max_position_embeddings=s.context, type_vocab_size=1,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=s.context, n_embd=s.width, n_layer=s.layers, n_head=s.heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def _rows(texts: Sequence[str], tokenizer: Any, context: int) -> tuple[Any, Any]:
    """All texts end to end in rows of the context; the last tenth is not learnt: `(N, T)` and `(M, T)`.

    Error: DATA-10 (not even a row for each).
    """
    import torch

    end = [tokenizer.eos_token_id]
    ids = [i for text in texts for i in [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]]
    rows = torch.tensor(ids[: len(ids) // context * context]).view(-1, context)
    if len(rows) < 2:
        raise MaeseError("DATA-10", rows=len(rows), tokens=len(ids), needed=2)
    cut = max(1, len(rows) // 10)
    return rows[:-cut], rows[-cut:]


def loss_of(kind: str, hole: int) -> Callable[[Any, Any], Any]:
    """What a model of a kind learns from a batch of rows (B, T): its mean loss, in nats per token learnt."""

    def causal(model: Any, ids_BT: Any) -> Any:
        return loss_sum(model, {"input_ids": ids_BT, "labels": ids_BT}) / ids_BT[:, 1:].numel()

    def filling(model: Any, ids_BT: Any) -> Any:
        import torch
        import torch.nn.functional as F

        chosen, lot = torch.rand(ids_BT.shape) < MASKED, torch.rand(ids_BT.shape)
        seen = torch.where(chosen & (lot < 0.8), hole, ids_BT)
        seen = torch.where(chosen & (lot >= 0.9), torch.randint(0, hole, ids_BT.shape), seen)
        # The vocabulary is asked only where there is something to fill in: a seventh of the work of the head.
        logits = model.cls(model.base_model(input_ids=seen).last_hidden_state[chosen])
        return F.cross_entropy(logits.float(), ids_BT[chosen], reduction="sum") / chosen.sum().clamp(min=1)

    return causal if kind == "decoder" else filling


def learn(
    model: Any,
    loss: Callable[[Any, Any], Any],
    rows_NT: Any,
    settings: Study,
    tell: Callable[[int], object] | None = None,
) -> list[float]:
    """Steps over the rows, in an order that depends on the seed alone; the loss of each."""
    import torch

    train = Train(lr=settings.lr, weight_decay=0.01, warmup=0.05)
    adamw, curve = optimizer(model, train), []
    model.train()
    order = batches(len(rows_NT), settings.rows, 1, settings.seed, 0, settings.steps)
    for step, (chosen,) in enumerate(order):
        for group in adamw.param_groups:
            group["lr"] = rate(step, settings.steps, train)
        value = loss(model, rows_NT[chosen])
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        curve.append(float(value.detach()))
        if tell:
            tell(step + 1)
    model.eval()
    return curve


def hole_accuracy(kind: str, model: Any, held: Held, hole: int) -> float:
    """How often the word of a hole is the likeliest: for the encoder with both sides seen, for the decoder the left."""
    import torch

    right = total = 0
    with torch.no_grad():
        for ids, holes in zip(held.ids_BT.split(32), held.holes_BT.split(32), strict=True):
            if kind == "encoder":
                said = model(input_ids=torch.where(holes, hole, ids)).logits.argmax(-1)
            else:
                said = torch.cat([ids[:, :1], model(input_ids=ids).logits[:, :-1].argmax(-1)], 1)
            holes = holes.clone()
            holes[:, 0] = False  # nothing comes before it: the decoder has nothing to say of it
            right, total = right + int((said == ids)[holes].sum()), total + int(holes.sum())
    return right / max(1, total)


def perplexity(model: Any, held: Held) -> float:
    """Of the decoder on what was held out, per token. An encoder has none: it gives no text a probability."""
    import torch

    with torch.no_grad():
        nats = sum(float(loss_sum(model, {"input_ids": b, "labels": b})) for b in held.ids_BT.split(32))
    return math.exp(nats / held.ids_BT[:, 1:].numel())


def features(model: Any, ids_BT: Any) -> Any:
    """One vector a row (B, D): the mean of its last layer."""
    return model.base_model(input_ids=ids_BT).last_hidden_state.mean(1)


def similarity(model: Any, rows_BT: Any) -> float:
    """How often the half nearest to another (cosine), among those of all rows, is the other half of its own row."""
    import torch

    half = rows_BT.shape[1] // 2
    with torch.no_grad():
        one, other = (features(model, part.contiguous()) for part in (rows_BT[:, :half], rows_BT[:, half : 2 * half]))
    one, other = (x - x.mean(0) for x in (one, other))  # what all rows share tells none of them
    near = torch.nn.functional.normalize(one, dim=1) @ torch.nn.functional.normalize(other, dim=1).T
    return float((near.argmax(1) == torch.arange(len(near))).float().mean())


def probe(model: Any, labelled: Labelled, tokenizer: Any, settings: Study, tuned: bool = False) -> float:
    """Share of texts whose class a line through the features finds, on a fifth that was held out.

    Frozen, the line alone is learnt: what the model knew already. `tuned`, the model moves too.
    """
    import torch
    import torch.nn.functional as F

    classes = sorted({label for _, label in labelled})
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][: settings.context] for text, _ in labelled]
    targets = torch.tensor([classes.index(label) for _, label in labelled])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    cut = max(1, len(rows) // 5)
    apart, learnt = order[:cut], order[cut:]
    line = torch.nn.Linear(settings.width, len(classes))

    def said(chosen: list[int]) -> Any:
        return line(torch.cat([features(model, torch.tensor([rows[i]])) for i in chosen]))

    if tuned:
        mover = torch.optim.AdamW([*model.parameters(), *line.parameters()], lr=settings.lr / 5)
        for start in range(0, 2 * len(learnt), settings.rows):
            chosen = [learnt[i % len(learnt)] for i in range(start, start + settings.rows)]
            F.cross_entropy(said(chosen), targets[chosen]).backward()
            mover.step()
            mover.zero_grad(set_to_none=True)
    else:
        with torch.no_grad():
            seen = torch.cat([features(model, torch.tensor([rows[i]])) for i in learnt])
        straight = torch.optim.LBFGS(line.parameters(), max_iter=60, line_search_fn="strong_wolfe")

        def again() -> Any:
            straight.zero_grad()
            loss = F.cross_entropy(line(seen), targets[learnt]) + 1e-3 * line.weight.square().sum()
            loss.backward()
            return loss

        straight.step(again)
    with torch.no_grad():
        return float((said(apart).argmax(1) == targets[apart]).float().mean())


def write(kind: str, model: Any, tokenizer: Any, opening: str, hole: int, context: int) -> str:
    """What each writes after an opening, its likeliest word each time: the encoder, a hole at the end at a time."""
    import torch

    ids = tokenizer(opening, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for _ in range(min(FOLLOWED, context - len(ids) - 1)):
            seen = [*ids, hole] if kind == "encoder" else ids
            ids.append(int(model(input_ids=torch.tensor([seen])).logits[0, -1, :hole].argmax()))
    return str(tokenizer.decode(ids))
