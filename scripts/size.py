"""How big the house is (`make size`): lines, the longest functions, dependencies, comments. Watched, not enforced."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "maese"
DATA_FOLDERS = {"embedded", "shipped"}  # weights and recipes, not code


def stage(path: Path) -> str:
    """The folder of a file inside the package; files at the top stand under `.`."""
    inner = path.relative_to(PACKAGE).parts
    return inner[0] if len(inner) > 1 else "."


def functions(path: Path, source: str):
    """`(lines, "train/loop.py:train")` of every function and method."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield (node.end_lineno or node.lineno) - node.lineno + 1, f"{path.relative_to(PACKAGE)}:{node.name}"


def comments(source: str) -> int:
    """Lines with a comment: `comments("x = 1  # why")` is 1. Docstrings are counted as code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})


def main() -> None:
    paths = [p for p in sorted(PACKAGE.rglob("*.py")) if stage(p) not in DATA_FOLDERS]
    sources = {path: path.read_text("utf-8") for path in paths}
    lines = {path: len(source.splitlines()) for path, source in sources.items()}
    total = sum(lines.values())

    print(f"{'folder':<12}{'files':>6}{'lines':>8}")
    for folder in sorted({stage(path) for path in paths}):
        inside = [lines[path] for path in paths if stage(path) == folder]
        print(f"{folder:<12}{len(inside):>6}{sum(inside):>8}")
    print(f"{'all':<12}{len(paths):>6}{total:>8}")
    largest = max(paths, key=lines.__getitem__)
    print(f"\nfile: median {statistics.median(lines.values()):.0f} lines, largest {lines[largest]}", end=" ")
    print(f"({largest.relative_to(PACKAGE)})")

    found = sorted((each for path in paths for each in functions(path, sources[path])), reverse=True)
    print(f"function: median {statistics.median(length for length, _ in found):.0f} lines; the ten longest")
    for length, name in found[:10]:
        print(f"{length:>6}  {name}")

    filled = sum(1 for source in sources.values() for line in source.splitlines() if line.strip())
    remarks = sum(comments(source) for source in sources.values())
    print(f"\ncomments: {100 * remarks / filled:.1f} in 100 lines that are not blank")

    words = sum(len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("say/*.toml"))
    tests = sum(len(path.read_text("utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py"))
    print(f"beside the code: {words} lines of catalogue, {tests} lines of tests")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    print(f"dependencies: {len(project['dependencies'])} core;", end=" ")
    print(", ".join(f"{name} {len(packages)}" for name, packages in extras.items()))


if __name__ == "__main__":
    main()
