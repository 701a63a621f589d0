"""From the name of a base to a model and its tokenizer: one of the package's, a folder, or a hub id.

    folder = resolve("embedded")
    model, tokenizer = load_model(folder), load_tokenizer(folder)

Only safetensors are opened: other formats can run code while they load. No code of a model folder is ever run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.model.gguf import PACKAGED, packaged, unpacked
from maese.plan.machine import few_kernels
from maese.recipe import INSIDE, at_home
from maese.say import say

UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
# `gpt2-xl`, `owner/name`, either with `@revision`.
HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*(@[\w./-]+)?")
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


def resolve(base: str) -> Path:
    """The folder of a base. A hub id may name a revision: `owner/name@main`.

    Before the network is used, that is said aloud. Errors: MODEL-01 (not found, or no network), MODEL-02 (the hub
    asks for permission), MODEL-03 (only unsafe formats), those of `model.gguf`.
    """
    if base in INSIDE:
        return INSIDE[base]
    if base in PACKAGED:
        return packaged(base)
    folder = at_home(base)
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        return unpacked(folder)
    nearest = _nearest(folder)
    # «embeded» is a slip of the hand, not a model to be asked for on the network.
    slip = "/" not in base and difflib.get_close_matches(base, [*INSIDE, *PACKAGED], cutoff=0.7)
    if slip or not HUB_ID.fullmatch(base):
        raise MaeseError("MODEL-01", base=base, reason=say("model.no_folder"), nearest=nearest)
    return _from_hub(base, nearest)


def _from_hub(base: str, nearest: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = base.partition("@")
    wanted: dict[str, Any] = {"repo_id": name, "revision": revision or None, "allow_patterns": WANTED}
    try:
        here = Path(snapshot_download(**wanted, local_files_only=True))
        if weight_files(here) and not _not_here(here):  # what is here needs no network; a download that was cut does
            return here
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        pass
    sys.stderr.write(say("model.asking", name=name) + "\n")
    try:
        return Path(snapshot_download(**wanted))
    except GatedRepoError as problem:
        raise MaeseError("MODEL-02", base=name) from problem
    except Exception as problem:  # the hub's client raises many kinds; to a person they are one: it did not come
        answered = isinstance(problem, HfHubHTTPError) and not isinstance(problem, LocalEntryNotFoundError)
        reason = type(problem).__name__ if answered else say("model.unreachable")
        raise MaeseError("MODEL-01", base=base, reason=reason, nearest=nearest) from problem


def check(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder that is safe and complete enough to open."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise MaeseError("MODEL-01", base=str(folder), reason="config.json", nearest="embedded")
    config = read_json(folder, "config.json")
    if "auto_map" in config:
        raise MaeseError("MODEL-05", base=str(folder))
    missing = _not_here(folder)
    if missing:
        raise MaeseError("MODEL-03", base=str(folder), files=", ".join(missing[:3]))
    if not weight_files(folder):
        unsafe = sorted(p.name for p in folder.iterdir() if p.suffix in UNSAFE)
        if unsafe:
            raise MaeseError("MODEL-03", base=str(folder), files=", ".join(unsafe[:3]))
        raise MaeseError("MODEL-01", base=str(folder), reason="*.safetensors", nearest="embedded")
    return config


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A file of notes of a model folder; empty, where there is none. Error: MODEL-06 (it cannot be read)."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise MaeseError("MODEL-06", base=str(folder), reason=f"{name}: {problem}"[:80]) from problem
    if not isinstance(found, dict):
        raise MaeseError("MODEL-06", base=str(folder), reason=f"{name}: {type(found).__name__}")
    return found


def header(folder: Path, *names: str) -> dict[str, tuple[list[int], str]]:
    """The shape and the bits of each tensor of the weight files of a folder, or of those named; no weight is read.

    Error: MODEL-06 (a file is cut).
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[list[int], str]] = {}
    for path in [folder / name for name in names] or weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118  # it is no dict
                found |= {name: (list(part.get_shape()), str(part.get_dtype())) for name, part in slices}
        except SafetensorError as problem:
            raise MaeseError("MODEL-06", base=str(folder), reason=f"{path.name}: {problem}"[:80]) from problem
    return found


def _not_here(folder: Path) -> list[str]:
    """Files that the index of a model in pieces names and that are not safetensors of this folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        named = {str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError):
        return [index.name]
    here = {path.name for path in weight_files(folder)}
    return sorted(named - here)


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def load_model(folder: Path, dtype: str = "fp32", **more: Any) -> Any:
    """The causal model of a folder, in evaluation mode. `dtype` is that of the weights: fp32, bf16 or fp16.

    `more` is for transformers: see `model.quant`.
    """
    quiet()
    few_kernels()
    check(folder)
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            output_loading_info=True, **more,
        )  # fmt: skip
    except SafetensorError as problem:
        raise MaeseError("MODEL-06", base=str(folder), reason=str(problem)[:80]) from problem
    except (ValueError, KeyError) as problem:
        raise MaeseError("MODEL-04", base=str(folder), reason=str(problem).splitlines()[0][:100]) from problem
    except RuntimeError as problem:
        if "mismatched" not in str(problem):
            raise
        raise MaeseError("MODEL-06", base=str(folder), reason="config.json ≠ *.safetensors") from problem
    except (MemoryError, OSError):
        raise
    except Exception as problem:  # a configuration of another kind than it should be raises whatever finds it first
        raise MaeseError("MODEL-06", base=str(folder), reason=" ".join(str(problem).split())[:100]) from problem
    model, info = loaded
    if info["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise MaeseError("MODEL-06", base=str(folder), reason=f"∅ {min(info['missing_keys'])}")
    # Nor does it mind weights of extra layers than the configuration has: it would be another model.
    known = {_any_number(key) for key in model.state_dict()}
    extra = sorted(key for key in info["unexpected_keys"] if _any_number(key) in known)
    if extra or getattr(model.config, "num_hidden_layers", 1) < 1:
        raise MaeseError("MODEL-06", base=str(folder), reason=f"config.json ≠ {(extra or ['*.safetensors'])[0]}")
    return model.eval()


def _any_number(key: str) -> str:
    """The name of a weight whichever layer it is of: `h.3.attn.bias` is `h.#.attn.bias`, with no prefix."""
    return re.sub(r"\d+", "#", key.removeprefix("transformer.").removeprefix("model."))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. One without a pad token borrows the end token for filling, in memory only."""
    quiet()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as problem:  # a damaged file raises whatever the reader of its format does
        _refuse_config(folder)  # it looks at the configuration of the model too
        raise MaeseError("TOKEN-01", base=str(folder)) from problem
    # From a folder without tokenizer files, transformers makes one that knows no word.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise MaeseError("TOKEN-01", base=str(folder))
    if tokenizer.eos_token_id is None:
        raise MaeseError("TOKEN-02", base=str(folder))
    return tokenizer


def _refuse_config(folder: Path) -> None:
    """MODEL-06 where a configuration says what none can; another architecture than those known is for `load_model`."""
    from transformers import AutoConfig

    read_json(folder, "config.json")
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return
    except Exception as problem:
        reason = " ".join(f"config.json: {problem}".split())[:100]
        raise MaeseError("MODEL-06", base=str(folder), reason=reason) from problem


def refuse_rowless(model: Any, tokenizer: Any, folder: Path, new: list[int] | None = None) -> None:
    """TOKEN-07 where a tokenizer has ids for which the model has no row, but for those that are about to get one.

    A token for filling is never read: one without a row is given up, and rows are filled with the end token.
    """
    rows = len(model.get_input_embeddings().weight)
    fill, known = tokenizer.pad_token_id, {*(new or ())}
    beyond = {i: word for word, i in tokenizer.get_vocab().items() if i >= rows and i not in known}
    if fill in beyond:
        del beyond[fill]
        if not known:  # otherwise it gets its row with the others
            tokenizer.pad_token = None
    if beyond:
        words = ", ".join(beyond[i] for i in sorted(beyond)[:4])
        raise MaeseError("TOKEN-07", base=str(folder), n=len(beyond), tokens=words, rows=rows)


def pad_id(tokenizer: Any) -> int:
    """The id rows are filled with. It may be the end token: labels never look at it (see tokens.batches.collate)."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def ids_of(tokenizer: Any) -> int:
    """How many rows its ids ask for: one more than the highest."""
    return max(tokenizer.get_vocab().values()) + 1


def context_of(model: Any) -> int:
    """The longest row the model takes, in tokens."""
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 20)


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weight files of a base: what an adapter belongs to."""
    return _hash(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(folder)))


@lru_cache
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    # Kept while the files are the same: each of many adapters asks it of one base, which may weigh gigabytes.
    digest = hashlib.sha256()
    for path, _, _ in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


def quiet() -> None:
    """The libraries' own bars and warnings would tear the display; what matters is said in our words."""
    from transformers.utils import logging as talk

    talk.set_verbosity_error()
    talk.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    # Where that package is installed, transformers and bitsandbytes fetch native code from the hub with it.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # what Python takes for «not to be imported»
    warnings.filterwarnings("ignore", module=r"(peft|torch|transformers|accelerate|bitsandbytes)(\..*)?")


def _nearest(folder: Path) -> str:
    around = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, around, n=1, cutoff=0.5)
    return str(folder.parent / near[0]) if near else "embedded"
