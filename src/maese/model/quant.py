"""A base in 4 bits, which stays as it is while adapters over it learn: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

    model = load_quantized(folder, "bf16", "cuda")      a model whose matrices hold half a byte for each number
    quantized(model)                                    its matrices in 4 bits

In:  the folder of a base. Out: a model of transformers where every matrix but the head is of NF4, the 16 values that
split a normal distribution into equal shares, with a scale for each 64 numbers, itself kept in 8 bits (double
quantization). Embeddings, norms and head stay in the precision of the run, and so does all arithmetic: a matrix is
unfolded for each product and let go of. bitsandbytes does it, on a card and on a processor.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.model.load import check, header, load_model, quiet
from maese.say import say

BLOCK = 64  # numbers that share a scale
# Between two neighbours of the 16 values there are at most 0.31 of the largest number of the block: half of that, and
# what the scale loses in 8 bits.
WORST = 0.17
# What a card must have beside the weights, to write with them: a share of them, and bytes.
SPARE, ROOM = 1.1, 400 << 20


def load_quantized(folder: Path, dtype: str, device: str) -> Any:
    """The causal model of a folder in 4 bits, on the device where it will be used; `dtype` is that of all else.

    Tensors are read and quantized one by one: no more memory is needed than for what is left of them.
    Errors: DEP-01 (no bitsandbytes), QUANT-01 (it cannot run here), and those of `load_model`.
    """
    refuse_unable(device)
    import torch
    from transformers import BitsAndBytesConfig

    compute = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    model = load_model(folder, dtype, quantization_config=settings, device_map={"": device})
    for module in quantized(model):
        # With the instructions of newer processors it would repack its weight the first time it only reads, as in
        # validation, and from then on let no gradient through, without a word.
        module.support_avx512bf16_for_cpu = False
    return model


def open_base(folder: Path, method: str | None = None) -> Any:
    """A model to write with, where it will: on the card, whole and in fp32, wherever there is room for it.

    On a smaller card it comes in 16 bits, which is said aloud. Where those do not fit either, what was learnt over 4
    bits (`method`) finds its base as it was then, and any other model stays on the processor.
    """
    card = _card()
    if card is None:
        return load_model(folder)
    check(folder)
    device, free, half = card
    dtype = precision_that_fits(sum(math.prod(shape) for shape, _ in header(folder).values()), free, half)
    if dtype is None and method == "qlora":
        sys.stderr.write(say("model.four_bits", folder=folder.name) + "\n")
        return load_quantized(folder, half, device)
    if dtype is None:
        sys.stderr.write(say("model.on_processor", folder=folder.name) + "\n")
        return load_model(folder)
    if dtype != "fp32":
        sys.stderr.write(say("model.sixteen_bits", folder=folder.name) + "\n")
    return load_model(folder, dtype).to(device)


def precision_that_fits(numbers: int, free: int, half: str) -> str | None:
    """fp32, 16 bits (`half`) or neither, for so many numbers in so many free bytes."""
    fits = {"fp32": 4, half: 2}
    return next((name for name, each in fits.items() if numbers * each * SPARE + ROOM <= free), None)


def _card() -> tuple[str, int, str] | None:
    """The card of this machine, its free bytes, and the 16 bits it multiplies in."""
    import torch

    if not torch.cuda.is_available():
        return None
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "cuda", torch.cuda.mem_get_info()[0], half


def refuse_unable(device: str) -> None:
    """DEP-01 without bitsandbytes, and QUANT-01 where a small matrix does not come back as it should."""
    quiet()
    import torch

    try:
        from bitsandbytes import functional
    except ImportError:
        raise MaeseError("DEP-01", package="bitsandbytes", extra="qlora") from None
    try:
        wanted = torch.outer(torch.linspace(0.5, 2, 4 * BLOCK), torch.linspace(-1, 1, BLOCK)).to(device)
        packed, state = functional.quantize_4bit(wanted, quant_type="nf4", compress_statistics=True)
        found = functional.dequantize_4bit(packed, state)
        reason = "" if bool(((found - wanted).abs() <= WORST * wanted.abs().amax(1, True)).all()) else "NF4 ≠"
    except Exception as problem:  # a library that does not load raises what it likes, when first asked for something
        said = str(problem).strip().splitlines() or [type(problem).__name__]
        reason = said[0][:120]
    if reason:
        raise MaeseError("QUANT-01", reason=reason, device=device)


def quantized(model: Any) -> list[Any]:
    """The modules of a model whose weight is in 4 bits."""
    # Its own and not what is inside it: an adapter shows the weight of its matrix as if it were its own.
    own = ((part, part._parameters.get("weight")) for part in model.modules())
    return [part for part, weight in own if getattr(weight, "quant_state", None) is not None]
