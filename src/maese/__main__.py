"""`python -m maese` and the `maese` command: choose the language, then open the command line."""

from __future__ import annotations

import os
import sys


def main() -> None:
    # Help texts are fixed when the commands are defined, so the language must be known before they are imported.
    for i, word in enumerate(sys.argv):
        if word == "--lang" and i + 1 < len(sys.argv):
            os.environ["MAESE_LANG"] = sys.argv[i + 1]
        elif word.startswith("--lang="):
            os.environ["MAESE_LANG"] = word.partition("=")[2]
    from maese.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
