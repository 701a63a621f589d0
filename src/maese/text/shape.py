"""A row of columns to a conversation or a document, by the shapes people publish instructions in.

    shape_of({"instruction": "…", "output": "…"})          "alpaca"
    item_of({"prompt": "¿Y?", "completion": "Sí."}, "prompt", …)   Conversation((user: ¿Y?), (assistant: Sí.))

Columns with other names are mapped by the recipe (`map: {prompt: pregunta, completion: respuesta}`); what they mean is
proposed, never guessed: a column taken for another teaches the wrong thing without a sound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from maese.errors import MaeseError
from maese.text.record import Conversation, Document, Message

# What each shape needs, in the order they are looked for.
SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
USED = {"messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "system"}
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "developer": "system"}
# Names people give to the two sides, only to propose a mapping.
ASKS = ("pregunta", "question", "query", "instruccion", "instrucción", "enunciado", "entrada", "user", "problema")
ANSWERS = ("respuesta", "answer", "response", "salida", "solucion", "solución", "assistant", "contestacion", "target")
WORDS = ("texto", "content", "contenido", "cuerpo", "body", "oracion", "oración", "sentence")


def mapped(row: dict[str, Any], names: Mapping[Any, str]) -> dict[str, Any]:
    """The row under the names maese knows: `mapped({"p": "a"}, {"prompt": "p"})` is `{"prompt": "a"}`."""
    taken = set(names.values())
    return {k: v for k, v in row.items() if k not in taken} | {k: row[v] for k, v in names.items() if v in row}


def shape_of(row: dict[str, Any]) -> str | None:
    """The shape whose columns the row has, or None."""
    for shape, needed in SHAPES.items():
        if all(name in row for name in needed):
            return shape
    return None


def unknown(row: dict[str, Any], path: str, line: int, shape: str | None = None) -> MaeseError:
    """DATA-03 with a command that converts the file when its columns suggest one."""
    ask = next((k for k in row if k.lower() in ASKS), None)
    answer = next((k for k in row if k.lower() in ANSWERS), None)
    text = next((k for k in row if k.lower() in WORDS), None)
    if ask and answer:
        command = f"--prompt {ask} --completion {answer}"
    elif text:
        command = f"--text {text}"
    else:
        names = [*map(str, row), "a", "b"]
        command = f"--prompt {names[0]} --completion {names[1]}"
    return MaeseError("DATA-03", path=path, line=line, keys=", ".join(map(str, row))[:80], command=command)


def item_of(row: dict[str, Any], shape: str, path: str, line: int) -> Conversation | Document:
    """A row in one of SHAPES as a record. Errors: DATA-03 (columns missing), DATA-12 (another shape than the file's),
    DATA-21 (a value that is not text)."""
    if any(name not in row for name in SHAPES[shape]):
        other = shape_of(row)
        if other:
            raise MaeseError("DATA-12", path=path, line=line, format=shape, other_format=other)
        raise unknown(row, path, line, shape)
    where = f"{path}#{line}"
    meta = {k: v for k, v in row.items() if k not in USED and isinstance(v, (str, int, float))} | {"line": line}
    if shape == "text":
        return Document(_text(row["text"], "text", path, line), where, meta)
    if shape in ("messages", "sharegpt"):
        turns = _turns(row["messages" if shape == "messages" else "conversations"], path, line)
        if row.get("system") and not (turns and turns[0].role == "system"):
            turns = (Message("system", _text(row["system"], "system", path, line)), *turns)
        return Conversation(turns, where, meta)
    system = (Message("system", _text(row["system"], "system", path, line)),) if row.get("system") else ()
    if shape == "alpaca":
        parts = [_text(row.get(name) or "", name, path, line).strip() for name in ("instruction", "input")]
        asked: tuple[Message, ...] = (Message("user", "\n\n".join(part for part in parts if part)),)
        said: tuple[Message, ...] = (Message("assistant", _text(row["output"], "output", path, line)),)
    else:
        asked, said = (_side(row[name], name, role, path, line) for name, role in _SIDES)
    return Conversation((*system, *asked, *said), where, meta)


_SIDES = (("prompt", "user"), ("completion", "assistant"))


def _side(value: Any, name: str, role: str, path: str, line: int) -> tuple[Message, ...]:
    """A prompt or completion is a text, or itself a list of turns."""
    if isinstance(value, list):
        return _turns(value, path, line)
    return (Message(role, _text(value, name, path, line)),)


def _turns(value: Any, path: str, line: int) -> tuple[Message, ...]:
    if isinstance(value, str):  # some tables keep the list as JSON inside a cell
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise MaeseError("DATA-21", path=path, line=line, name="messages", found=type(value).__name__)
    turns = []
    for turn in value:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role is None or ("content" not in turn and "value" not in turn):
            raise unknown(turn, path, line)
        if isinstance(content, list):  # OpenAI's parts: only the text of them can be learnt
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        name = str(role).lower()
        turns.append(Message(SPEAKERS.get(name, name), _text(content, "content", path, line)))
    return tuple(turns)


def _text(value: Any, name: str, path: str, line: int) -> str:
    if value is None or value != value:  # NaN is how tables write nothing
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise MaeseError("DATA-21", path=path, line=line, name=name, found=type(value).__name__)
