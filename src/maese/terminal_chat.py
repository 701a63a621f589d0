"""The chat on a terminal or over a pipe: who speaks, each reply labelled, and the commands that write something.

In: lines of the keyboard or of a file, one question or `/command` each. Out: the replies to stdout, as they come, and
all that is said about them to stderr. Ctrl+C stops the reply and not the chat.
"""

from __future__ import annotations

import contextlib
import json as jsons
import re
import sys
from pathlib import Path
from typing import Any

from maese.errors import MaeseError
from maese.live import shorten
from maese.say import percent, say
from maese.spoken import too_long
from maese.terminal import as_data, columns, complain, fewer, fold, footer, talk

EXIT, HELP = ("/exit", "/quit", "/salir"), ("/help", "/?", "/ayuda")
ALTERNATIVE = 12  # signs of a token in the table of /next


def chat(company: Any, settings: dict[str, Any], save: Path | None = None, json: bool = False, quiet: int = 0) -> None:
    """A conversation until `/exit` or the end of the input; with `save`, written there after every turn."""
    from maese.generate.chat import Chat

    if hasattr(sys.stdin, "reconfigure"):  # a byte that is no letter must not end a conversation
        sys.stdin.reconfigure(errors="replace")
    room = Room(Chat(company, **settings), save, json, quiet)
    room.greet()
    while (line := room.hear()) is not None and line.split(" ")[0] not in EXIT:
        try:
            room.do(line)
        except MaeseError as problem:
            complain(problem)
        except OSError as problem:
            if not (named := too_long(problem)):
                raise
            complain(named)
        except (MemoryError, RuntimeError) as problem:
            from maese.train.guard import give_back, out_of_memory

            if not out_of_memory(problem):
                raise
            give_back()  # what was being written is let go of, and the conversation stays as it was
            complain(MaeseError("MEM-06"))
        except KeyboardInterrupt:  # of a table or a file half way; a reply keeps what it had
            sys.stderr.write("\n")


class Room:
    """The face of one conversation: where it is heard, how it is shown, and where it is kept."""

    def __init__(self, conversation: Any, save: Path | None, json: bool, quiet: int) -> None:
        self.chat, self.kept, self.json, self.quiet = conversation, save, json, quiet
        self.typed = sys.stdin.isatty()
        self.live = sys.stdout.isatty() and not json
        if self.typed:
            with contextlib.suppress(ImportError):  # arrows and history, where the system has them
                import readline  # noqa: F401

    def say(self, text: str) -> None:
        talk(fold(text) if sys.stderr.isatty() else text, self.json, self.quiet)

    def greet(self) -> None:
        writer = self.chat.writer
        kind = "chat.hello_text" if writer.format == "text" else "chat.hello"
        self.say(say(kind, name=writer.name))
        if self.chat.settings.get("system") and writer.format == "text":
            self.say(say("generate.no_system"))
        self.introduce(writer.name)

    def introduce(self, name: str) -> None:
        """What one can ask whoever answers from now on."""
        examples = self.chat.company.examples(name)[:3]
        if examples and self.chat.writer.format != "text":
            self.say(say("chat.examples", examples=" · ".join(say("chat.example", text=text) for text in examples)))

    def hear(self) -> str | None:
        """The next line, or None when the person leaves: Ctrl+C leaves a line half typed, and twice the chat."""
        for last in (False, True):
            try:
                return input(say("chat.you") if self.typed else "").strip()
            except EOFError:
                if self.typed:
                    sys.stderr.write("\n")
                return None
            except KeyboardInterrupt:
                sys.stderr.write("\n")
                if not last:
                    self.say(say("chat.again"))
        return None

    def do(self, line: str) -> None:
        """Carry out one line. Errors are the conversation's."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if line in HELP:
            self.say(say("chat.help"))
        elif name == "/retry":
            self.retry()
        elif name == "/edit":
            self.edit(rest)
        elif name == "/ask-all":
            self.ask_all(rest)
        elif name == "/next":
            self.next(rest)
        elif name == "/compare":
            self.compare()
        elif line.startswith("/"):
            key, facts = self.chat.command(line)
            self.say(say(key, **facts))
            if key == "chat.persona":
                self.introduce(facts["name"])
        elif line:
            self.ask(line)

    def ask(self, line: str, instead: bool = False) -> None:
        """A question and its answer, as it comes; `instead` of the last ones, once they are there."""
        page = Page(self.live)
        page.begin(self.label(self.chat.writer, self.live), line if self.chat.writer.format == "text" else "")
        answer = self.chat.reply(line, None if self.json else page.write, instead)
        page.end()
        self.about(line, answer, self.chat.chosen)
        self.keep()

    def retry(self) -> None:
        question = self.chat.asked
        self.chat.settings["seed"] = self.chat.chosen.seed + 1
        self.ask(question, instead=True)

    def edit(self, text: str) -> None:
        """Ask the last question in other words: those given, or those a person makes of the old ones."""
        old = self.chat.asked
        words = text or (self.rewrite(old) if self.typed else old)
        if words is not None:
            self.ask(words or old, instead=True)

    def rewrite(self, old: str) -> str | None:
        """The old words as a person leaves them; None where Ctrl+C or the end of the input leaves all as it was."""
        try:
            import readline
        except ImportError:
            return old
        readline.set_startup_hook(lambda: readline.insert_text(old))
        try:
            return input(say("chat.you")).strip()
        except (KeyboardInterrupt, EOFError):
            return None
        finally:
            readline.set_startup_hook()

    def ask_all(self, question: str) -> None:
        """Every personality to one question: written together, shown one after another."""
        if not question:
            raise MaeseError("CHAT-01")
        asked = self.chat.company.personas
        parts: list[list[str]] = [[] for _ in asked]
        ended: dict[int, Any] = {}
        page, turn = Page(self.live), 0

        def begin(i: int) -> None:
            page.begin(self.label(asked[i], True), question if asked[i].format == "text" else "")

        def hear(i: int, piece: str) -> None:
            if i == turn:
                page.write(piece)
            else:
                parts[i].append(piece)

        def end(i: int, answer: Any) -> None:
            nonlocal turn
            ended[i] = answer
            while turn in ended:
                page.end()
                mine = asked[turn] is self.chat.writer or (self.chat.writer not in asked and not turn)
                self.about(question, ended[turn], asked[turn].with_settings(self.chat.settings), mine)
                turn += 1
                if turn < len(asked):
                    begin(turn)
                    page.write("".join(parts[turn]))

        if self.json:
            for answer, writer in zip(self.chat.ask_all(question), asked, strict=True):
                self.about(question, answer, writer.with_settings(self.chat.settings))
        else:
            if asked:
                begin(0)
            self.chat.ask_all(question, hear, end)
        self.keep()

    def compare(self) -> None:
        """The last question to the untouched base, below what was answered."""
        last = self.chat.last
        page = Page(self.live)
        if last and not self.json:
            page.begin(f"{say('chat.base')}> ", last.prompt if last.writer.format == "text" else "")
        exchange, answer, prints = self.chat.on_base(None if self.json else page.write)
        page.end()
        self.about(exchange.prompt, answer, exchange.settings, kept=False)
        self.say(say("chat.proof", name=exchange.writer.name, before=prints[0][:8], after=prints[1][:8]))

    def next(self, count: str) -> None:
        """For each token of the last answer, or of the first so many, the five likeliest at its place."""
        from maese.tokens.look import mask_pieces
        from maese.tokens.template import Example

        exchange, places = self.chat.alternatives()
        tokenizer = exchange.writer.tokenizer
        shown = places[: int(count)] if count.isdecimal() and int(count) else places
        ids = [token for place in shown for token, _ in ((place.token, 0.0), *place.best)]
        pieces = mask_pieces(Example(ids, [0] * len(ids)), tokenizer)
        whole = {token: piece["text"] for token, piece in zip(ids, pieces, strict=True)}
        texts = {token: shorten(text, ALTERNATIVE) for token, text in whole.items()}
        self.say(say("chat.next", n=len(shown)))
        for place in shown:
            mark = f"{texts[place.token]:<{ALTERNATIVE}} {percent(place.chance, 1):>7}  "
            best = [f"{texts[token]}\u00a0{percent(chance, 1)}" for token, chance in place.best]
            if self.json:
                facts = {"token": whole[place.token], "p": place.chance}
                facts["best"] = [{"token": whole[token], "p": chance} for token, chance in place.best]
                sys.stdout.write(jsons.dumps(facts, ensure_ascii=False) + "\n")
            else:
                line = mark + " · ".join(best)
                sys.stdout.write((fold(line, " " * len(mark)) if self.live else line) + "\n")
        sys.stdout.flush()

    def label(self, writer: Any, wanted: bool) -> str:
        return f"{writer.name}> " if wanted and writer.name and not self.json else ""

    def about(self, question: str, answer: Any, settings: Any, kept: bool = True) -> None:
        """The line below a reply: who, how much, how fast, how; and what did not go as asked.

        `kept`: the reply is a turn of the conversation.
        """
        if self.json:
            as_data(question, answer)
            return
        stopped = answer.reason == "stopped"
        if stopped:
            said = "stopped" if answer.text.strip() else "stopped_empty"
            self.say(say(f"chat.{said}" if kept else "chat.stopped_aside"))
        if answer.reason == "context":
            from maese.model.load import context_of

            self.say(say("chat.no_room", longest=context_of(self.chat.writer.model)))
        if self.chat.dropped:
            self.say(say("chat.dropped", n=self.chat.dropped // 2))
        for line in (*(() if stopped else fewer(answer, settings)), footer(answer, settings)):
            self.say(line)

    def keep(self) -> None:
        if self.kept:
            self.chat.save(self.kept)


class Page:
    """Text that comes in pieces, written to stdout; on a terminal no word is cut at the edge."""

    def __init__(self, live: bool) -> None:
        self.width = columns() if live else 0
        self.column, self.word, self.waiting, self.begun = 0, "", "", False

    def begin(self, label: str, text: str = "") -> None:
        """What goes before the text, shown with its first piece: what fails before it leaves no label behind."""
        self.column, self.word, self.waiting, self.begun = 0, "", label + text, False

    def write(self, piece: str) -> None:
        before, self.waiting = self.waiting, ""
        self.begun = self.begun or bool(before + piece)
        if not self.width:
            self._put(before + piece)
            return
        for part in re.split(r"([ \t\n])", before + piece):
            if part in (" ", "\t", "\n"):
                self._flush()
                self._put("\n" if part == "\n" else part if self.column < self.width else "")
            else:
                self.word += part
        sys.stdout.flush()

    def end(self) -> None:
        if self.waiting:  # an answer without a word is one too
            self.write("")
        self._flush()
        if self.begun:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self.begun = False

    def _flush(self) -> None:
        if self.word and self.column and self.column + len(self.word) > self.width:
            self._put("\n")
        word, self.word = self.word, ""
        self._put(word)

    def _put(self, text: str) -> None:
        sys.stdout.write(text)
        if not self.width:
            sys.stdout.flush()
        self.column = 0 if text.endswith("\n") else self.column + len(text)
