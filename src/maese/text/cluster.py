"""Sources and rules to a script for many machines: datatrove runs it here, on Slurm or on Ray.

    write_plan(Path("limpiar.py"), ["corpus/*.jsonl.gz"], "limpio", executor="slurm", tasks=64, workers=16,
               rules=["length", "repetition"], near=True)
    python limpiar.py            limpio/kept/00000.jsonl.gz …, limpio/dropped/00000.jsonl …, limpio/summary.json

The script is meant to be read and changed: what can be set stands at its top. To write it nothing needs to be
installed; to run it, `pip install "maese[cluster]"`.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from string import Template
from typing import Literal

from maese.errors import MaeseError
from maese.run import write_whole
from maese.say import say

Executor = Literal["local", "slurm", "ray"]
CLASSES = {"local": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}

SCRIPT = Template('''\
"""$intro"""
$import_ray
from datatrove.executor.$executor import $class_name

from maese.text.cluster_steps import Join, Keep, ReadShards, Rules, Signatures, shards

$c_sources
SOURCES = $sources
FORMAT = $format
OUTPUT = $output

$c_rules
RULES = $rules
NEAR = $near

$c_tasks
TASKS = $tasks
WORKERS = $workers
$machine

def stage(name, pipeline, tasks, depends=None, memory_gb=2):
    return $class_name(
        pipeline=pipeline,
        tasks=tasks,
        workers=min(WORKERS, tasks),
        logging_dir=f"{OUTPUT}/logs/{name}",
        depends=depends,$options
    )


def plan():
    files = shards(SOURCES)
    tasks = min(TASKS, len(files))
$c_look
    look = stage("1-look", [ReadShards(files, FORMAT), Rules(RULES), Signatures(OUTPUT, NEAR)], tasks)
$c_join
    join = stage("2-join", [Join(OUTPUT, len(files), NEAR)], 1, depends=look$join_memory)
$c_keep
    return stage("3-keep", [ReadShards(files, FORMAT), Keep(OUTPUT)], tasks, depends=join)


$c_start
if __name__ == "__main__":
    $start
''')
# What each executor needs besides: lines at the top of the script, arguments of a stage, how it starts.
MACHINE = {
    "local": "",
    "slurm": '$c_slurm\nPARTITION = "cpu"\nTIME = "12:00:00"\nENVIRONMENT = "source .venv/bin/activate"\n'
    "JOIN_MEMORY_GB = 16\n",
    "ray": '$c_ray\nADDRESS = "auto"\nJOIN_MEMORY_GB = 16\n',
}
OPTIONS = {
    "local": [],
    "slurm": [
        "partition=PARTITION",
        "time=TIME",
        "env_command=ENVIRONMENT",
        "mem_per_cpu_gb=memory_gb",
        'job_name=f"maese-{name}"',
        'mail_type="NONE"',
    ],
    "ray": ["mem_per_cpu_gb=memory_gb"],
}
START = {"local": "plan().run()", "slurm": "plan().run()", "ray": "ray.init(address=ADDRESS)\n    plan().run()"}


def write_plan(
    path: Path,
    sources: list[str],
    output: str,
    executor: Executor = "local",
    tasks: int = 1,
    workers: int = 1,
    rules: list[str] | None = None,
    near: bool = True,
    format: str = "auto",
) -> Path:
    """Write the script and return its path. `tasks` is in how many parts the files are shared out, `workers` how many
    run at once. Error: RUN-01 when the file exists."""
    if path.exists():
        raise MaeseError("RUN-01", path=str(path), free=str(path.with_stem(f"{path.stem}-2")))
    names = ("sources", "rules", "tasks", "slurm", "ray", "look", "join", "keep", "start")
    comments = {f"c_{name}": _comment(say(f"cluster.script.{name}")) for name in names}
    for name in ("look", "join", "keep"):
        comments[f"c_{name}"] = textwrap.indent(comments[f"c_{name}"], "    ")
    text = SCRIPT.substitute(
        comments,
        intro=_paragraphs(say("cluster.script.intro", script=path.name)),
        import_ray="\nimport ray" if executor == "ray" else "",
        executor=executor,
        class_name=CLASSES[executor],
        sources=repr(list(sources)),
        format=repr(format),
        output=repr(output.rstrip("/")),
        rules=repr(list(rules or [])),
        near=near,
        tasks=tasks,
        workers=workers,
        machine="\n" + Template(MACHINE[executor]).substitute(comments) if MACHINE[executor] else "",
        options="".join(f"\n        {option}," for option in OPTIONS[executor]),
        join_memory="" if executor == "local" else ", memory_gb=JOIN_MEMORY_GB",
        start=START[executor],
    )
    write_whole(path, text)
    return path


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in textwrap.wrap(text, 116))


def _paragraphs(text: str) -> str:
    return "\n".join(textwrap.fill(line, 116) for line in text.strip().splitlines()) + "\n"
