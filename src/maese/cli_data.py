"""The commands that look at data and tokenizers: `data`, `tokenizer` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from maese.say import say
from maese.spoken import Group

PATH = click.Path(path_type=Path)
MENDED = (
    "encoding", "mojibake", "bom", "control", "not_nfc", "surrogate", "roles", "bad_json", "keys", "not_text",
    "empty_turn", "empty_user", "empty_text", "one_sided", "exact_duplicate",
)  # fmt: skip
COLUMNS = ("prompt", "completion", "instruction", "input", "output", "system", "messages", "text")


@click.group(cls=Group, help=say("cli.data.help"))
def data() -> None:
    pass


@click.group(cls=Group, help=say("cli.tokenizer.help"))
def tokenizer() -> None:
    pass


@click.group(cls=Group, help=say("cli.inspect.help"))
def inspect() -> None:
    pass


@data.command("get", help=say("cli.data_get.help"))
@click.argument("name", metavar=say("cli.metavar.name"))
@click.option("--folder", default="data", type=PATH, metavar=say("cli.metavar.path"), help=say("cli.data_get.folder"))
@click.pass_context
def data_get(ctx: click.Context, name: str, folder: Path) -> None:
    from maese import terminal
    from maese.text import get

    terminal.talk(say("data.asking", address=get.address(name)), **ctx.obj)
    path, words = get.get(name, folder)
    click.echo(path)
    terminal.talk(say("data.got", path=str(path), words=words), **ctx.obj)


def _seen_by(recipe: str | None, changes: dict[str, Any], path: str | None) -> tuple[Any, Any, list[Any]]:
    """The recipe that says how data are looked at, its tokenizer, and the sources: those given, or the recipe's."""
    from maese import recipe as recipes
    from maese.model import load

    given = {key: value for key, value in changes.items() if value is not None}
    if recipe:
        chosen = recipes.load(recipe, [f"{key}={value}" for key, value in given.items()])
    else:
        # Nothing was said of what is too long: it is told, and is no fault of the data.
        plain: dict[str, Any] = {"sources": [{"path": path or "-"}], "max_length": 512, "too_long": "truncate"}
        base = given.pop("base", "embedded")
        plain |= {key.removeprefix("data."): recipes.scalar(value) for key, value in given.items()}
        chosen = recipes.check({"name": "data", "base": base, "data": plain})
    load.quiet()
    found = load.load_tokenizer(load.resolve(chosen.base))
    if not path:
        return chosen, found, list(chosen.data.sources)
    # Another file than the recipe's is looked at as what it is.
    data = chosen.data.model_copy(update={"format": "auto"})
    return chosen.model_copy(update={"data": data}), found, [recipes.Source(path=path)]


def looking_options(command: Any) -> Any:
    """How data are to be looked at, the same for `check`, `show` and `inspect template`."""
    for option in reversed(
        [
            click.option("--recipe", metavar=say("cli.metavar.recipe"), help=say("cli.look.recipe")),
            click.option("--base", metavar=say("cli.metavar.model"), help=say("cli.look.base")),
            click.option("--template", metavar=say("cli.metavar.name"), help=say("cli.look.template")),
            click.option("--max-length", type=int, metavar="N", help=say("cli.look.max_length")),
        ]
    ):
        command = option(command)
    return command


def _changes(base: str | None, template: str | None, max_length: int | None) -> dict[str, Any]:
    return {"base": base, "data.template": template, "data.max_length": max_length}


def mapping_options(command: Any) -> Any:
    """The name that each column has in the file."""
    for name in reversed(COLUMNS):
        option = click.option(
            f"--{name}", f"column_{name}", metavar=say("cli.metavar.column"), help=say("cli.map", name=name)
        )
        command = option(command)
    return command


@data.command("check", help=say("cli.data_check.help"))
@click.argument("path", required=False, metavar=say("cli.metavar.maybe_file"))
@looking_options
@mapping_options
@click.option("--near", is_flag=True, help=say("cli.data_check.near"))
@click.option("--html", type=PATH, metavar=say("cli.metavar.path"), help=say("cli.data_check.html"))
@click.pass_context
def data_check(ctx: click.Context, path: str | None, near: bool, html: Path | None, **given: Any) -> None:
    from maese import terminal
    from maese.terminal_data import show_audit

    recipe = given.pop("recipe")
    columns = {key: given.pop(key) for key in list(given) if key.startswith("column_")}
    chosen, found, sources = _seen_by(recipe, _changes(**given), path)
    if path:
        sources = [_source(path, columns)]
    from maese.tokens.check import check

    audits = [check(source, chosen.data, found, chosen.eval.prompts, near) for source in sources]
    if ctx.obj["json"] and len(audits) > 1:
        import json

        click.echo(json.dumps([audit.json() for audit in audits], ensure_ascii=False))
    else:
        for audit in audits:
            show_audit(audit, **ctx.obj)
    if html:
        from maese.report.views.doctor import doctor_html
        from maese.run import write_whole

        for i, audit in enumerate(audits):
            page = html.with_stem(f"{html.stem}-{i + 1}") if len(audits) > 1 else html
            write_whole(page, doctor_html(audit))
            terminal.talk(say("data.page", path=str(page)), **ctx.obj)
    if any(audit.of("error") for audit in audits):
        raise click.exceptions.Exit(1)


@data.command("show", help=say("cli.data_show.help"))
@click.argument("path", required=False, metavar=say("cli.metavar.maybe_file"))
@looking_options
@click.option("--row", type=click.IntRange(1), metavar="N", help=say("cli.data_show.row"))
@click.option("--rows", type=click.IntRange(1), metavar="N", help=say("cli.data_show.rows"))
@click.option("--html", type=PATH, metavar=say("cli.metavar.path"), help=say("cli.data_show.html"))
@click.pass_context
def data_show(
    ctx: click.Context, path: str | None, row: int | None, rows: int | None, html: Path | None, **given: Any
) -> None:
    _show(ctx, path, row or 1, rows or (1 if row else 3), html, **given)


@inspect.command("template", help=say("cli.inspect_template.help"))
@click.argument("path", required=False, metavar=say("cli.metavar.maybe_file"))
@looking_options
@click.option("--row", type=click.IntRange(1), default=1, metavar="N", help=say("cli.data_show.row"))
@click.option("--html", type=PATH, metavar=say("cli.metavar.path"), help=say("cli.data_show.html"))
@click.pass_context
def inspect_template(ctx: click.Context, path: str | None, row: int, html: Path | None, **given: Any) -> None:
    _show(ctx, path, row, 1, html, **given)


def _show(ctx: click.Context, path: str | None, row: int, rows: int, html: Path | None, **given: Any) -> None:
    from maese import terminal
    from maese.errors import MaeseError
    from maese.terminal_tokens import show_rows

    recipe = given.pop("recipe")
    chosen, found, sources = _seen_by(recipe, _changes(**given), path)
    from maese.tokens.check import shown

    seen = list(shown(sources[0], chosen.data, found, row, rows))
    if not seen:
        raise MaeseError("DATA-24", path=sources[0].name, row=row)
    show_rows(seen, **ctx.obj)
    if html:
        from maese.report.views.mask import mask_html
        from maese.run import write_whole

        write_whole(html, mask_html(seen))
        terminal.talk(say("data.page", path=str(html)), **ctx.obj)


@data.command("fix", help=say("cli.data_fix.help"))
@click.argument("path", metavar=say("cli.metavar.file"))
@click.option("--output", type=PATH, metavar=say("cli.metavar.path"), help=say("cli.data_fix.output"))
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(MENDED),
    metavar=say("cli.metavar.kind"),
    help=say("cli.data_fix.only", kinds=", ".join(MENDED)),
)
@click.pass_context
def data_fix(ctx: click.Context, path: str, output: Path | None, only: tuple[str, ...]) -> None:
    from maese.terminal_data import show_mended
    from maese.text.mend import mend
    from maese.text.repair import fixed_name

    done = mend(path, output or Path(fixed_name(path)), set(only) or None)
    _result(ctx, done.output, kept=done.kept, changed=done.changed, dropped=done.dropped, diff=str(done.diff))
    show_mended(done, **ctx.obj)


def _stem(path: str) -> Path:
    """The name without what says how it is written: `_stem("a/b.messages.jsonl.gz")` is `a/b.messages`."""
    place = Path("stdin" if path == "-" else path)
    place = place if place.name else place.resolve()
    while place.suffix.lower() in (".gz", ".zst", ".bz2", ".xz", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"):
        place = place.with_suffix("")
    return place


def _result(ctx: click.Context, *paths: Path, **facts: Any) -> None:
    """What was written: one path a line, or everything that is known of it as JSON."""
    if ctx.obj["json"]:
        import json

        click.echo(json.dumps({"paths": [str(path) for path in paths]} | facts, ensure_ascii=False))
    else:
        click.echo("\n".join(map(str, paths)))


def _source(path: str, columns: dict[str, Any]) -> Any:
    from maese.recipe import Source

    names = {key.removeprefix("column_"): value for key, value in columns.items() if value is not None}
    return Source.model_validate({"path": path, "map": names})


@data.command("convert", help=say("cli.data_convert.help"))
@click.argument("path", metavar=say("cli.metavar.file"))
@mapping_options
@click.option("--to", "output", type=PATH, metavar=say("cli.metavar.path"), help=say("cli.data_convert.to"))
@click.pass_context
def data_convert(ctx: click.Context, path: str, output: Path | None, **columns: Any) -> None:
    from maese import terminal
    from maese.text.convert import convert

    target = output or Path(f"{_stem(path)}.messages.jsonl")
    count = convert(_source(path, columns), target)
    _result(ctx, target, rows=count)
    terminal.talk(say("data.converted", n=count, path=str(target)), **ctx.obj)


@data.command("split", help=say("cli.data_split.help"))
@click.argument("path", metavar=say("cli.metavar.file"))
@click.option("--share", type=click.FloatRange(0.001, 0.9), default=0.1, metavar="N", help=say("cli.data_split.share"))
@click.option("--group", metavar=say("cli.metavar.column"), help=say("cli.data_split.group"))
@click.pass_context
def data_split(ctx: click.Context, path: str, share: float, group: str | None) -> None:
    from maese import terminal
    from maese.text.convert import divide

    stem = _stem(path)
    outputs = Path(f"{stem}.train.jsonl"), Path(f"{stem}.validation.jsonl")
    learnt, kept = divide(_source(path, {}), share, group, outputs)
    _result(ctx, *outputs, train=learnt, validation=kept)
    terminal.talk(say("data.divided", learnt=learnt, kept=kept), **ctx.obj)


@data.command("cluster-plan", help=say("cli.data_cluster_plan.help"))
@click.argument("paths", nargs=-1, required=True, metavar=say("cli.metavar.files"))
@click.option(
    "--script", type=PATH, default="cluster.py", metavar=say("cli.metavar.path"), help=say("cli.cluster.script")
)
@click.option("--output", default="clean", metavar=say("cli.metavar.path"), help=say("cli.cluster.output"))
@click.option(
    "--executor", type=click.Choice(["local", "slurm", "ray"]), default="local", help=say("cli.cluster.executor")
)
@click.option("--tasks", type=click.IntRange(1), default=1, metavar="N", help=say("cli.cluster.tasks"))
@click.option("--workers", type=click.IntRange(1), default=1, metavar="N", help=say("cli.cluster.workers"))
@click.option(
    "--rule",
    "rules",
    multiple=True,
    type=click.Choice(["length", "repetition", "symbols", "language"]),
    help=say("cli.cluster.rule"),
)
@click.option("--near/--exact", default=True, help=say("cli.cluster.near"))
@click.pass_context
def data_cluster_plan(ctx: click.Context, paths: tuple[str, ...], script: Path, **given: Any) -> None:
    from maese import terminal
    from maese.text import streams
    from maese.text.cluster import write_plan

    for path in paths:
        if given["executor"] == "local" and not any(sign in path for sign in "*?["):
            streams.locate(path)
    _result(ctx, write_plan(script, list(paths), **given | {"rules": list(given["rules"])}))
    terminal.talk(say("data.planned", path=str(script)), **ctx.obj)


@tokenizer.command("train", help=say("cli.tokenizer_train.help"))
@click.argument("paths", nargs=-1, required=True, metavar=say("cli.metavar.files"))
@click.option("--size", type=click.IntRange(300), default=32_000, metavar="N", help=say("cli.tokenizer_train.size"))
@click.option(
    "--output", type=PATH, default="tokenizer", metavar=say("cli.metavar.path"), help=say("cli.tokenizer_train.output")
)
@click.option(
    "--pattern",
    type=click.Choice(["gpt2", "llama3", "qwen2", "bloom"]),
    default=None,
    help=say("cli.tokenizer_train.pattern"),
)
@click.option("--limit-mb", type=click.FloatRange(0.001, 1e9), metavar="N", help=say("cli.tokenizer_train.limit_mb"))
@click.pass_context
def tokenizer_train(
    ctx: click.Context, paths: tuple[str, ...], size: int, output: Path, pattern: str | None, limit_mb: float | None
) -> None:
    from maese import terminal, terminal_tokens
    from maese.recipe import Source
    from maese.text.read import open_source, texts_of
    from maese.tokens.train import DEFAULT, train_tokenizer

    readings = [open_source(Source(path=path)) for path in paths]
    texts = (text for reading in readings for item in reading for text in texts_of(item))
    with terminal_tokens.bar(**ctx.obj) as progress:
        folder = train_tokenizer(
            texts, size, output, pattern or DEFAULT, progress=progress, limit_mb=limit_mb, sources=list(paths)
        )
    click.echo(folder)
    terminal.talk(say("tokenizer.done", path=str(folder)), **ctx.obj)


@tokenizer.command("compare", help=say("cli.tokenizer_compare.help"))
@click.argument("names", nargs=-1, required=True, metavar=say("cli.metavar.models"))
@click.option("--text", "path", metavar=say("cli.metavar.file"), help=say("cli.tokenizer_compare.text"))
@click.option("--png", type=PATH, metavar=say("cli.metavar.path"), help=say("cli.tokenizer_compare.png"))
@click.pass_context
def tokenizer_compare(ctx: click.Context, names: tuple[str, ...], path: str | None, png: Path | None) -> None:
    from maese import terminal, terminal_tokens
    from maese.run import disk
    from maese.tokens import compare

    texts = None
    if path:
        from maese.recipe import Source
        from maese.text.read import open_source, texts_of

        whole = (text for item in open_source(Source(path=path)) for text in texts_of(item))
        texts = {Path(path).name: [text.encode("utf-8", "replace").decode("utf-8") for text in whole]}
    result = compare.compare(names, texts)
    terminal_tokens.show_tables(compare.tables(result), result, **ctx.obj)
    if png:
        with disk(png):
            png.parent.mkdir(parents=True, exist_ok=True)
            compare.plot(result, png)
        terminal.talk(say("data.page", path=str(png)), **ctx.obj)
