"""Checkpoints: whole or not there at all, checked by hash, and enough to go on bit for bit.

    checkpoints/best-000150/   model.safetensors
    checkpoints/step-000200/   model.safetensors  optimizer.safetensors  rng.safetensors  MANIFEST.json

Written to a folder beside it, every file forced to the disk, the manifest last, then renamed in one move. A crash at
any instant leaves the previous checkpoint whole. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.run import disk, sync

MANIFEST = "MANIFEST.json"


def save(folder: Path, step: int, model: Any, optimizer: Any, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step and let go of those beyond `keep`. Error: DISK-01, with nothing half written."""
    final = folder / f"step-{step:06d}"
    draft = folder / f"{final.name}.tmp-{os.getpid()}"
    with disk(folder):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            _write(draft / "model.safetensors", trainable(model))
            _write(draft / "optimizer.safetensors", optimizer_tensors(model, optimizer))
            _write(draft / "rng.safetensors", rng_tensors())
            files = {p.name: {"sha256": _sha256(p), "bytes": p.stat().st_size} for p in sorted(draft.iterdir())}
            manifest = {"step": step, "state": state, "files": files}
            with open(draft / MANIFEST, "w", encoding="utf-8") as out:
                json.dump(manifest, out, indent=1)
                out.flush()
                os.fsync(out.fileno())
            sync(draft)
            if final.exists():
                shutil.rmtree(final)
            os.replace(draft, final)
            sync(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    for old in saved(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def saved(folder: Path) -> list[Path]:
    """The checkpoints of a run by step; those half written are not among them."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def sweep(folder: Path) -> None:
    """Remove what a process that died in the middle of a save left half written."""
    for path in (*folder.rglob("*.tmp-*"), *folder.glob("*.old-*")):
        shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path) -> tuple[Path, dict[str, Any], list[tuple[str, str]]]:
    """The newest checkpoint that is whole, its manifest, and those refused on the way with the file that was wrong.

    Error: RESUME-02 when none is left.
    """
    refused: list[tuple[str, str]] = []
    for path in reversed(saved(folder)):
        wrong = damage(path)
        if wrong is None:
            return path, json.loads((path / MANIFEST).read_text("utf-8")), refused
        refused.append((path.name, wrong))
    raise MaeseError("RESUME-02", folder=str(folder), refused=", ".join(f"{n} ({w})" for n, w in refused) or "—")


def damage(path: Path) -> str | None:
    """The first file of a checkpoint that is not as it was written, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return MANIFEST
    for name, facts in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != facts["bytes"] or _sha256(file) != facts["sha256"]:
            return name
    return None


def restore(path: Path, model: Any, optimizer: Any) -> None:
    """Put weights, optimizer and random state back as they were."""
    import torch
    from safetensors.torch import load_file

    load_weights(path, model)
    tensors = load_file(path / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = {k.rsplit("|", 1)[1]: v for k, v in tensors.items() if k.rsplit("|", 1)[0] == name}
            # The count of steps stays where the fused kernel wants it, beside the parameter.
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in found.items()}
    rng = load_file(path / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def best(folder: Path, step: int) -> Path:
    """Where the best weights are kept, under the step they are of, so that no others are taken for them."""
    return folder / f"best-{step:06d}"


def save_best(folder: Path, step: int, model: Any) -> Path:
    """Write the weights that train, alone: the optimizer is of no use to them."""
    final = best(folder, step)
    draft = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    with disk(folder):
        try:
            draft.mkdir(parents=True, exist_ok=True)
            _write(draft / "model.safetensors", trainable(model))
            sync(draft)
            shutil.rmtree(final, ignore_errors=True)  # of a life of this run that was cut later
            os.replace(draft, final)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    return final


def keep_best(folder: Path, step: int) -> None:
    """Let go of the others, once a checkpoint remembers which step was the best."""
    for path in folder.glob("best-*"):
        if path != best(folder, step):
            shutil.rmtree(path, ignore_errors=True)


def load_weights(folder: Path, model: Any) -> None:
    import torch
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name])


def trainable(model: Any) -> dict[str, Any]:
    return {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(model: Any, optimizer: Any) -> dict[str, Any]:
    """The optimizer's state by name of parameter: `{"transformer.wte.weight|exp_avg": …}`."""
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def rng_tensors() -> dict[str, Any]:
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _write(path: Path, tensors: dict[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as problem:
        # The library wraps the system's error in words of its own; a full disk must stay recognisable.
        if "No space left" in str(problem) or "os error 28" in str(problem):
            raise OSError(28, str(problem)) from problem
        raise
    sync(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
