"""Every error a person can meet, by code and facts; the words are in the catalogues of `say`.

    raise MaeseError("DATA-01", path="quijot.txt", nearest="quijote.txt")

Only a face (terminal, studio, report) turns a code into a sentence, so the same error reads in any language and a
test can ask for the code and not for its wording.
"""

from __future__ import annotations


class MaeseError(Exception):
    """An expected failure, with what a person needs to mend it.

    `code` names an entry `[error.<code>]` of the catalogues; `facts` fill its placeholders.
    """

    exit_code = 1
    agreed = False  # every process of the run has this error: the first one tells it for all

    def __init__(self, code: str, **facts: object) -> None:
        super().__init__(code, facts)
        self.code = code
        self.facts = facts

    def __str__(self) -> str:
        from maese.say import error_text

        return error_text(self.code, self.facts)


class UsageError(MaeseError):
    """The command line itself is wrong: unknown command, option or value."""

    exit_code = 2


class Interrupted(MaeseError):
    """The person, or the system, asked the run to stop; its work is saved."""

    def __init__(self, code: str, signal: int, **facts: object) -> None:
        super().__init__(code, **facts)
        self.exit_code = 128 + signal
