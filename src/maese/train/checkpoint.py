"""Checkpoints: whole or not there at all, checked by hash, and enough to go on bit for bit.

    checkpoints/best-000150/   model.safetensors  MANIFEST.json
    checkpoints/checkpoint-200/   model.safetensors  optimizer.safetensors  rng.safetensors  MANIFEST.json

Written to a folder beside it, every file forced to the disk, the manifest last, then renamed in one move. A crash at
any instant leaves the previous checkpoint whole. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from maese import recipe as recipes
from maese.errors import MaeseError
from maese.run import disk, sync
from maese.train.guard import rng_state, set_rng_state
from maese.train.sharding import as_pieces, gathered
from maese.train.together import Together

MANIFEST = "MANIFEST.json"
PREFIX = "checkpoint-"
ALONE = Together()
MARGIN = 64 << 20  # bytes left free beside what is written: events, the report, other programs

# What a resumed run may have otherwise than before: it changes when things are told or kept, and not what is learnt.
# The base and the texts are known by their content, wherever they lie now.
FREE = re.compile(
    r"name|output|base|data\.sources\.\d+\.path|(eval|generate)\..+"
    r"|train\.(save_every|keep|device|compile|memory_gib|patience|final|gradient_checkpointing|micro_batch|accumulation)"
)
LENGTH = ("train.max_steps", "train.epochs", "train.warmup")


def save(
    folder: Path,
    step: int,
    model: Any,
    optimizer: Any,
    state: dict[str, Any],
    keep: int,
    *,
    recipe: dict[str, Any] | None = None,
    scaler: Any = None,
    spare: Collection[int] = (),
    beside: dict[str, bytes] | None = None,
    together: Together = ALONE,
) -> Path:
    """Write the checkpoint of a step and let go of those beyond `keep`, but for the steps in `spare`.

    `recipe` is what `refusals` will ask for; `scaler` that of fp16; `beside` are files by name that go with it.
    Errors: DISK-01, DISK-02, DISK-03 (it would not fit), DISK-04 (the run folder is gone), each with nothing half
    written.
    """
    if not folder.parent.is_dir():  # to make it again would hide that the run has lost everything else
        raise MaeseError("DISK-04", path=str(folder.parent))
    tensors = {
        "model": trainable(model, here=together.rank == 0),
        "optimizer": optimizer_tensors(model, optimizer, here=together.rank == 0),
        "rng": rng_state(),
    }
    facts = {"step": step, "state": state, "recipe": recipe, "scaler": scaler.state_dict() if scaler else None}
    final = together.first(lambda: _put(folder, f"{PREFIX}{step}", tensors, facts, beside))
    if together.rank:
        return Path(final)
    # What is damaged is not counted, or it would push out one that is whole.
    for old in [path for path in saved(folder) if intact(path)][:-keep]:
        if step_of(old) not in spare:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _put(
    folder: Path, name: str, tensors: dict[str, dict[str, Any]], facts: dict[str, Any],
    beside: dict[str, bytes] | None = None,
) -> Path:  # fmt: skip
    """Write a folder of tensors with its manifest, whole or not at all."""
    final, tag = folder / name, os.getpid()
    draft, aside = folder / f"{name}.tmp-{tag}", folder / f"{name}.old-{tag}"
    room(folder, sum(_bytes(content.values()) for content in tensors.values()))
    with disk(folder):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            for file, content in tensors.items():
                _write(draft / f"{file}.safetensors", content)
            for file, raw in (beside or {}).items():
                (draft / file).write_bytes(raw)
                sync(draft / file)
            files = {p.name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for p in sorted(draft.iterdir())}
            manifest = facts | {"files": files}
            manifest["seal"] = _seal(manifest)
            (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            sync(draft / MANIFEST)
            sync(draft)
            if final.exists():
                os.replace(final, aside)
            os.replace(draft, final)
            sync(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            if aside.exists() and not final.exists():
                os.replace(aside, final)
            raise
    shutil.rmtree(aside, ignore_errors=True)
    return final


def room(folder: Path, size: int) -> None:
    """DISK-03 unless twice `size` bytes and a margin are free: the old ones go only after the new one is whole.

    Before step 1, `room(run.checkpoints, weight(model, optimizer))` refuses a run that could not be saved.
    """
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free, needed = shutil.disk_usage(existing).free, 2 * size + MARGIN
    if free < needed:
        raise MaeseError("DISK-03", path=str(folder), needed=needed / 2**30, free=free / 2**30)


def weight(model: Any, optimizer: Any) -> int:
    """Bytes of a checkpoint; before the first step AdamW's two moments are counted, which are not there yet."""
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [v for p in trained for v in optimizer.state.get(p, {}).values() if hasattr(v, "numel")]
    weights = _bytes(trained)
    return weights + max(_bytes(states), 2 * weights)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def step_of(path: Path) -> int | None:
    """The step a checkpoint is of, `step_of(Path("checkpoint-200"))` is 200; None for any other folder."""
    number = path.name.removeprefix(PREFIX)
    return int(number) if path.name.startswith(PREFIX) and number.isdigit() else None


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run by step; those half written are not among them."""
    return sorted((p for p in folder.glob(f"{PREFIX}*") if step_of(p) is not None), key=lambda p: step_of(p) or 0)


def sweep(folder: Path) -> None:
    """Remove what a process that died in the middle of a save left half written."""
    for path in folder.glob("*.old-*"):
        final = path.with_name(path.name.partition(".old-")[0])
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:  # it died between two renames: this is the last one that is whole
            os.replace(path, final)
    for path in folder.rglob("*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path) -> tuple[Path, dict[str, Any], list[tuple[str, str]]]:
    """The newest checkpoint that is whole, its manifest, and those refused on the way with the file that was wrong.

    Error: RESUME-02 when none is left.
    """
    refused: list[tuple[str, str]] = []
    for path in reversed(saved(folder)):
        wrong = damage(path)
        if wrong is None:
            return path, manifest_of(path), refused
        refused.append((path.name, wrong))
    raise MaeseError("RESUME-02", folder=str(folder), refused=", ".join(f"{n} ({w})" for n, w in refused) or "—")


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Errors: OSError and ValueError where it is not as it was written."""
    manifest = json.loads((path / MANIFEST).read_text("utf-8"))
    if not isinstance(manifest, dict) or manifest.pop("seal", None) != _seal(manifest):
        raise ValueError(MANIFEST)
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    """The hash of what a manifest says: a flipped bit in it may be a number as good as the one before."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def intact(path: Path) -> bool:
    """Whether a checkpoint looks whole, by its manifest and the sizes of its files; `damage` reads them through."""
    try:
        files = manifest_of(path)["files"]
        return all((path / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except (OSError, ValueError):
        return False


def damage(path: Path) -> str | None:
    """The first file of a checkpoint that is not as it was written, or cannot be read, or None."""
    try:
        files = manifest_of(path)["files"]
    except (OSError, ValueError):
        return MANIFEST
    for name, facts in files.items():
        try:
            if (path / name).stat().st_size != facts["bytes"] or _sha256(path / name) != facts["sha256"]:
                return name
        except OSError:
            return name
    return None


def refusals(before: dict[str, Any], now: dict[str, Any], level: bool = False) -> list[tuple[str, Any, Any]]:
    """What a run cannot be resumed across in two recipes (`model_dump`): `[("train.lr", 3e-4, 0.5)]`, then and now.

    What only decides when to look, save or speak may change, and so may the micro-batch while a step has as many rows.
    A key that one of them does not have yet, being older, has its default. A rate that is still constant (wsd) did not
    depend on how many steps were to come: before it falls, a run may be made longer or shorter.
    """
    old, new = _every_key(before), _every_key(now)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    refused = [key for key in changed if not FREE.fullmatch(key) and not (level and key in LENGTH)]
    one, other = "train.micro_batch", "train.accumulation"
    if old[one] * old[other] != new[one] * new[other]:
        refused += [key for key in (one, other) if key in changed]
    return [(key, old.get(key), new.get(key)) for key in refused]


def _every_key(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe flat, by dotted key, with the default of what it does not say."""
    sources = [recipes.fields(recipes.Source) | source for source in tree["data"]["sources"]]
    return recipes.fields() | _flat(tree | {"data": tree["data"] | {"sources": sources}})


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}, "x": [2]}` as `{"train.lr": 1, "x.0": 2}`."""
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if below is None:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in below:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def restore(path: Path, model: Any, optimizer: Any, scaler: Any = None) -> None:
    """Put weights, optimizer, random state and the fp16 scaler back as they were."""
    import torch
    from safetensors.torch import load_file

    load_weights(path, model)
    tensors = load_file(path / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = {k.rsplit("|", 1)[1]: v for k, v in tensors.items() if k.rsplit("|", 1)[0] == name}
            # The count of steps stays where the fused kernel wants it, beside the parameter.
            put = {k: as_pieces(v.to(parameter.device), parameter) for k, v in found.items()}
            # bitsandbytes counts in plain integers, which a file of tensors cannot hold.
            counts = {k: int(v) for k, v in put.items() if v.dtype == torch.int64 and not v.ndim}
            optimizer.state[parameter] = put | counts
    if scaler and (kept := manifest_of(path)["scaler"]):
        scaler.load_state_dict(kept)
    set_rng_state(load_file(path / "rng.safetensors"))


def best(folder: Path, step: int) -> Path:
    """Where the best weights are kept, under the step they are of, so that no others are taken for them."""
    return folder / f"best-{step:06d}"


def save_best(folder: Path, step: int, model: Any, together: Together = ALONE) -> Path:
    """Write the weights that train, alone: the optimizer is of no use to them. Errors: those of `save`."""
    if not folder.parent.is_dir():
        raise MaeseError("DISK-04", path=str(folder.parent))
    tensors = {"model": trainable(model, here=together.rank == 0)}
    return Path(together.first(lambda: _put(folder, best(folder, step).name, tensors, {"step": step})))


def keep_best(folder: Path, step: int) -> None:
    """Let go of the others, but for those that a kept checkpoint takes for the best: it may be gone back to."""
    held = {step}
    for path in filter(intact, saved(folder)):
        held.add(manifest_of(path)["state"].get("best_step", 0))
    for path in folder.glob("best-*"):
        if path not in {best(folder, each) for each in held}:
            shutil.rmtree(path, ignore_errors=True)


def load_weights(folder: Path, model: Any) -> None:
    """Put saved weights into what learns."""
    import torch
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(as_pieces(saved[name].to(parameter.device), parameter))


def average(folder: Path, model: Any) -> list[Path]:
    """Turn what learns into its mean with the weights of every whole checkpoint of a folder; returns those.

    In the last steps weights go round a valley whose middle is lower (Kaddour 2022, arXiv 2209.14981). Most of it is
    had already where the rate has come down to zero.
    """
    import torch
    from safetensors.torch import load_file

    paths = [path for path in saved(folder) if intact(path)]
    every = [load_file(path / "model.safetensors") for path in paths]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                for kept in every:
                    parameter.add_(as_pieces(kept[name].to(parameter.device), parameter))
                parameter.div_(len(every) + 1)
    return paths


def trainable(model: Any, here: bool = True) -> dict[str, Any]:
    """What learns, by name and in the precision it learns in; not `here`, pieces are only given to who gathers them."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: gathered(p, here) for name, p in named}


def optimizer_tensors(model: Any, optimizer: Any, here: bool = True) -> dict[str, Any]:
    """The optimizer's state by name of parameter: `{"transformer.wte.weight|exp_avg": …}`."""
    import torch

    def own(key: str, value: Any) -> Any:
        # Those of 8 bits share their tables of 256 numbers, and a file takes no two tensors over one memory.
        return value.clone() if key.startswith("qmap") else torch.as_tensor(value)

    return {
        f"{name}|{key}": gathered(own(key, value), here)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _write(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as problem:
        # The library wraps the system's error in words of its own; a full disk must stay recognisable.
        number = re.search(r"os error (\d+)", str(problem))
        if number is None:
            raise
        raise OSError(int(number[1]), str(problem)) from problem
    sync(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
