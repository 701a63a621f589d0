"""Adapters: put a LoRA on a model, or open one that was trained, after checking that it belongs there.

LoRA: Hu et al. 2021, arXiv 2106.09685. The files are PEFT's, so that every tool opens them; beside them
`maese.json` says which weights they were trained over.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.model import rows
from maese.model.load import header, load_tokenizer, quiet, read_json, resolve, weights_hash
from maese.recipe import Method
from maese.tokens.marks import added

ABOUT, CONFIG, WEIGHTS = "maese.json", "adapter_config.json", "adapter_model.safetensors"
TAKES_FROM_BASE = ("pissa", "olora", "corda", "loftq")  # of `init_lora_weights`
OF_ADAPTERS = re.compile(r"\.(lora_\w+|trainable_tokens_delta)(\.|$)")  # in the names of a file's tensors
TEXTS = ("base", "base_sha256", "method", "name", "format", "template")
KINDS = dict.fromkeys(TEXTS, str) | {"generate": dict, "examples": list}  # of what our notes say


def add_lora(model: Any, method: Method, tokenizer: Any = None, new: list[int] | tuple[int, ...] = ()) -> Any:
    """The model with fresh adapters; only they will train, and with them the rows of `new` tokens of its tokenizer.

    Errors: ADAPT-02 (a target the model does not have), ADAPT-03 (PEFT takes none there).
    """
    quiet()
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = method.targets
    more = rows.settings(model, list(new)) if new else {}
    if targets != "all-linear":
        present = linear_names(model)
        missing = [name for name in targets if name not in present]
        if missing:
            near = difflib.get_close_matches(missing[0], sorted(present), n=1, cutoff=0)
            raise MaeseError("ADAPT-02", target=missing[0], present=", ".join(sorted(present)), nearest=near[0])
    if head := more.pop("head", None):
        targets = sorted({head, *(linear_names(model) if targets == "all-linear" else targets)})
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]  # any positive number; its annotation is narrower
        lora_dropout=method.dropout,
        target_modules=targets,
        # GPT-2 keeps its matrices transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        **more,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as problem:  # what PEFT knows that a family cannot bear, as Mamba's out_proj
        raise MaeseError(
            "ADAPT-03", family=model.config.model_type, reason=str(problem).splitlines()[0][:160]
        ) from problem
    if new:
        rows.begin(adapted, tokenizer, list(new))
    return adapted


def linear_names(model: Any) -> set[str]:
    """Last names of the modules an adapter can go on: `{"c_attn", "c_proj", "c_fc"}` for GPT-2."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, Linear | Conv1D) and module is not head
    }


def attach(model: Any, folder: Path, base: Path, name: str | None = None) -> Any:
    """The model with the adapter of a folder, frozen, beside those it has already if it is given a `name` of its own.

    Errors: ADAPT-01 (trained over other weights), MODEL-03 (unsafe file), MODEL-06 (a file is cut, or they do not go
    together), TOKEN-06 (tokens without their rows), ADAPT-05 (more tokens of its own than one that came before),
    ADAPT-06 (no LoRA, or one that changes the base itself). After any of them the model is as it was.
    """
    quiet()
    from peft import PeftConfig, PeftModel

    if not (folder / WEIGHTS).is_file():
        unsafe = ", ".join(path.name for path in sorted(folder.glob("*.bin")))
        raise MaeseError("MODEL-03", base=str(folder), files=unsafe) if unsafe else _damaged(folder, f"∅ {WEIGHTS}")
    check_base(folder, base)
    # The tokens that came with it, for which the model may have to grow: only once all the rest is known to fit.
    read_json(folder, CONFIG)
    tensors, tokenizer = header(folder, WEIGHTS), load_tokenizer(folder) if brings_words(folder) else None
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if config.peft_type is None or not isinstance(rank := getattr(config, "r", 1), int) or rank < 1:
            raise ValueError(f"peft_type: {config.peft_type}, r: {getattr(config, 'r', 0)}")
    except (AttributeError, KeyError, TypeError, ValueError) as problem:  # notes that are JSON and say nothing of use
        raise _damaged(folder, f"{CONFIG}: {problem}") from problem
    _refuse_other_kinds(folder, config, model, name)
    if not _fits(model, tensors, len(tokenizer or ())):  # an adapter of another architecture, without our notes
        raise MaeseError("ADAPT-01", adapter=str(folder), expected="—", found=str(base))
    if tokenizer is not None:
        _make_room(model, tokenizer, tensors, folder, base)
    bare, voice = not isinstance(model, PeftModel), name or "default"
    try:
        if bare:
            adapted: Any = PeftModel.from_pretrained(model, str(folder), voice)
        else:
            adapted = model
            rows.heed_others(model)
            adapted.load_adapter(str(folder), voice, torch_device=str(model.device))
            # Tokens of its own would be at work already, whoever speaks.
            adapted.set_adapter(adapted.active_adapter, inference_mode=True)
        if reason := _lost(adapted, tensors, voice):
            raise _damaged(folder, reason)
    except MaeseError:
        _take_off(model, voice, bare)
        raise
    except KeyError as problem:  # a whole matrix that its notes name and its file does not hold
        _take_off(model, voice, bare)
        raise _damaged(folder, f"{WEIGHTS}: ∅ {problem.args[0]}") from problem
    except (RuntimeError, ValueError) as problem:  # what else PEFT finds that does not fit
        _take_off(model, voice, bare)
        if "base_sha256" in about_adapter(folder):  # it is the right base, so the files are not of one another
            raise _damaged(folder, f"{CONFIG} ≠ {WEIGHTS}") from problem
        raise MaeseError("ADAPT-01", adapter=str(folder), expected="—", found=str(base)) from problem
    if name is not None:  # one of many waits in the bits it was saved in: see voices.speaking
        _narrow(adapted, tensors, name)
    return adapted.requires_grad_(False).eval()


def _refuse_other_kinds(folder: Path, config: Any, model: Any, name: str | None) -> None:
    """ADAPT-06 for what is no LoRA, and for one that changes the base: others that speak over it would change too.

    PiSSA, OLoRA and their kin take their beginnings out of the base's own matrices each time they are opened; a bias
    that was trained stands in the place of the base's, which does no harm to an adapter that is alone.
    """
    kind, begins = config.peft_type.value, str(getattr(config, "init_lora_weights", True)).lower()
    if kind != "LORA" or begins.startswith(TAKES_FROM_BASE):
        raise MaeseError("ADAPT-06", adapter=str(folder), kind=kind if kind != "LORA" else begins)
    together = [config, *getattr(model, "peft_config", {}).values()] if name is not None else []
    if any(getattr(each, "bias", "none") != "none" for each in together):
        raise MaeseError("ADAPT-06", adapter=str(folder), kind="bias")


def _damaged(folder: Path, reason: str) -> MaeseError:
    return MaeseError("MODEL-06", base=str(folder), reason=reason.splitlines()[0][:100])


def _lost(model: Any, tensors: dict[str, Any], voice: str) -> str:
    """What of an adapter's file did not come to the model, or is no number; empty, where all is well.

    PEFT leaves out what has no place and fills what is missing with an adapter that does nothing, without a word.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, adapter_name=voice, save_embedding_layers=False)
    strange = {key for key in tensors if OF_ADAPTERS.search(key)} - own.keys()
    if different := (own.keys() - tensors.keys()) | strange or (set() if tensors else {"∅"}):
        return f"{WEIGHTS}: {min(different)}"
    broken = [path for path, part in own.items() if not bool(part.isfinite().all())]
    return f"{WEIGHTS}: NaN, {min(broken)}" if broken else ""


def _take_off(model: Any, voice: str, bare: bool) -> None:
    """Leave a model as it was before PEFT failed half way: those that speak over it go on."""
    if not bare:
        with contextlib.suppress(KeyError, ValueError):  # it had not come so far
            model.delete_adapter(voice)
        model.requires_grad_(False)
        return
    for parent in [*model.modules()]:
        for child, layer in [*parent.named_children()]:
            if hasattr(layer, "lora_A") or hasattr(layer, "trainable_tokens_delta"):
                setattr(parent, child, layer.get_base_layer())
    model.__dict__.pop("peft_config", None)


def _fits(model: Any, tensors: dict[str, Any], tokens: int) -> bool:
    """Whether every matrix of an adapter goes on one of this model: asked before PEFT begins to change it.

    Its head may have a row for each of its own `tokens`.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules, head = dict(inner.named_modules()), inner.get_output_embeddings()
    for key, (shape, _) in tensors.items():
        name, mark, kind = key.removeprefix("base_model.model.").partition(".lora_")
        if not mark or kind not in ("A.weight", "B.weight") or len(shape) != 2:
            continue
        module = modules.get(name)
        taken, given = _widths(module) if module is not None else (0, 0)
        if module is not None and module is head:
            given = max(given, tokens)
        if (shape[1] != taken) if kind == "A.weight" else (shape[0] != given):  # A is (R, I), B is (O, R)
            return False
    return True


def _widths(module: Any) -> tuple[int, int]:
    """What a linear module takes and gives; GPT-2 keeps its matrices transposed."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if hasattr(module, "nf") else (0, 0)


def _narrow(model: Any, tensors: dict[str, Any], name: str) -> None:
    """Put an adapter that PEFT widened to fp32 back into the bits of its file: no value changes."""
    import torch

    kinds = {bits for _, bits in tensors.values()}
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kinds.pop()) if len(kinds) == 1 else None
    for path, parameter in model.named_parameters():
        if dtype and ".lora_" in path and f".{name}." in path:
            parameter.data = parameter.data.to(dtype)


def _make_room(model: Any, tokenizer: Any, tensors: dict[str, Any], folder: Path, base: Path) -> None:
    """Let the model have rows for the tokens that came with an adapter, which must bring what they learnt."""
    new = added(tokenizer, load_tokenizer(base))
    if missing := sorted(set(new) - _trained(folder, tensors)):
        tokens = ", ".join(tokenizer.convert_ids_to_tokens(missing[:4]))
        raise MaeseError("TOKEN-06", adapter=str(folder), tokens=tokens, n=len(missing))
    if rows.token_layers(model) and len(tokenizer) > len(model.get_input_embeddings().weight):
        raise MaeseError("ADAPT-05", adapter=str(folder), n=len(new))  # what PEFT has wrapped does not grow
    rows.make_room(model, tokenizer, new)


def _trained(folder: Path, tensors: dict[str, Any]) -> set[int]:
    """The tokens whose rows an adapter holds, by PEFT's notes; all, where it holds an embedding whole."""
    listed = read_json(folder, CONFIG).get("trainable_token_indices") or []
    if isinstance(listed, dict):
        listed = [token for ids in listed.values() for token in ids]
    whole = [shape[0] for name, (shape, _) in tensors.items() if re.search(r"(embed\w*|wte)\.weight$", name)]
    return {*listed, *range(max(whole, default=0))}


def check_base(folder: Path, base: Path) -> None:
    about = about_adapter(folder)
    if about.get("base_sha256") and about["base_sha256"] != weights_hash(base):
        raise MaeseError("ADAPT-01", adapter=str(folder), expected=about.get("base", "—"), found=str(base))


def about_adapter(folder: Path) -> dict[str, Any]:
    """Our notes of an adapter, or of a model we trained; empty, where there are none.

    Error: MODEL-06 (they cannot be read, or hold a list where there should be a text).
    """
    about = {key: value for key, value in read_json(folder, ABOUT).items() if value is not None}
    for key, kind in KINDS.items():
        if key in about and not isinstance(about[key], kind):
            raise _damaged(folder, f"{ABOUT}: {key}: {about[key]}")
    return about


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def brings_words(folder: Path) -> bool:
    """Whether an adapter brings its tokenizer; those of the package use that of their base."""
    return (folder / "tokenizer.json").is_file()


def base_of(folder: Path, base: str | None = None) -> Path:
    """The folder of the weights an adapter goes over: those given, those of our notes, or those of PEFT's.

    Error: ADAPT-04 (they are no longer where they were, or nothing says where).
    """
    config = read_json(folder, CONFIG)
    theirs, revision = config.get("base_model_name_or_path"), config.get("revision")
    if theirs and revision and not Path(str(theirs)).exists():
        theirs = f"{theirs}@{revision}"
    named = str(base or about_adapter(folder).get("base") or theirs or "")
    if not named or (Path(named).is_absolute() and not Path(named).exists()):
        raise MaeseError("ADAPT-04", path=str(folder), base=named or "base_model_name_or_path")
    return resolve(named)
