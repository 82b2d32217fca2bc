"""The command line: every mistake is one line on stderr and exit code 2."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.table import Table

from experiments.catalogue import UsageError, listing_table, markdown_table, nearest
from experiments.launch import run_experiment
from experiments.plan import plan_experiment, plan_json, print_plan
from experiments.report import write_report
from experiments.sweep import submit, sweep_points
from jaxpapers.train import Terminated, initialize_distributed

COMMANDS = ("list", "run", "plan", "report")
# Bad input, a full disk, a missing file, a diverged training, a lost neighbour; the rest are bugs and keep a traceback.
EXPECTED = (ValueError, OSError, FloatingPointError, OverflowError, jax.errors.JaxRuntimeError)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (try {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments ...`; returns the exit code."""
    return _guarded(_command, sys.argv[1:] if argv is None else argv)


def main_config_file(argv: Sequence[str] | None = None) -> int:
    """`python -m experiments.run --config=FILE:preset ...`; returns the exit code."""
    return _guarded(_config_file_command, sys.argv[1:] if argv is None else argv)


def _guarded(command: Any, argv: Sequence[str]) -> int:
    try:
        return command(list(argv))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except EXPECTED as error:
        if os.environ.get("JAXPAPERS_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())} (JAXPAPERS_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    except Terminated as stopped:
        print(f"{stopped}; the same command resumes", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the newest checkpoint", file=sys.stderr)
        return 130


def _command(argv: list[str]) -> int:
    parser = _Parser(prog="python -m experiments", description="Runs the papers' experiments and checks their claims.")
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    listing = commands.add_parser("list", help="all papers: room, slug, title, state")
    listing.add_argument("--markdown", action="store_true", help="as the README's table")
    running = commands.add_parser("run", help="run one experiment and check its claims", description=_RUN_HELP)
    running.add_argument("paper", metavar="SLUG[:PRESET]", help="e.g. alrnn or alrnn:smoke; default preset: small")
    _add_run_options(running)
    running.add_argument("--sweep", action="append", default=[], metavar="config.FIELD=A,B", help="one run a value")
    running.add_argument("--slurm", action="store_true", help="queue the sweep's runs as an array job")
    running.add_argument("--slurm-option", action="append", default=[], metavar="NAME=VALUE", help="as of submitit")
    planning = commands.add_parser("plan", help="compile for a pod on this machine", description=_PLAN_HELP)
    planning.add_argument("paper", metavar="SLUG[:PRESET]")
    planning.add_argument("--topology", required=True, help="v5e:16x16, v5p:4x4x4, v6e:16x16, cpu:8, ...")
    planning.add_argument("--programs", default="", help="only those whose names contain this regular expression")
    planning.add_argument("--json", action="store_true", help="for machines")
    reporting = commands.add_parser("report", help="all results as Markdown and one HTML page")
    reporting.add_argument("folder", nargs="?", type=_folder, help="where the runs are; default runs/")
    reporting.add_argument("--output", type=_folder, default=Path("report"), help="to write into; default report/")
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise UsageError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "run":
        if arguments.slurm_option and not arguments.slurm:
            raise UsageError("--slurm-option needs --slurm")
        if arguments.sweep or arguments.slurm:
            return _sweep(arguments, rest)
        return _run(arguments.paper, arguments, rest)
    if arguments.command == "plan":
        return _plan(arguments, rest)
    if rest:
        known = {"list": ["--markdown"], "report": ["--output"]}[arguments.command]
        raise UsageError(f"unknown option {rest[0]!r}{nearest(rest[0], [*known, '--help'])}")
    if arguments.command == "report":
        if arguments.output.is_file():
            raise UsageError(f"--output={arguments.output} is a file, and a folder is needed")
        for path in write_report(arguments.folder, arguments.output):
            print(path)
        return 0
    if arguments.markdown:
        print(markdown_table())
    else:
        Console().print(listing_table())
    return 0


def _config_file_command(argv: list[str]) -> int:
    parser = _Parser(prog="python -m experiments.run", description=_RUN_HELP)
    parser.add_argument("--config", required=True, metavar="FILE[:PRESET]", help="experiments/<room>/<slug>.py:small")
    _add_run_options(parser)
    arguments, rest = parser.parse_known_args(argv)
    return _run(arguments.config, arguments, rest)


_PLAN_HELP = (
    "Compiles every program of an experiment for a topology, and prints what it needs of each device. "
    "Exit code 1 if one of them does not compile or does not fit."
)
_RUN_HELP = "Any field of the config can be set: --config.seed=1 --config.model.width=64. Lists are written 1,2,3."
_OPTIONS = ("--workdir", "--overwrite", "--strict", "--record", "--sweep", "--slurm", "--config.FIELD=VALUE")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=_folder, help="where the run is kept; default runs/<slug>/<preset>")
    parser.add_argument("--overwrite", action="store_true", help="drop an earlier run in the workdir")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a claim fails")
    parser.add_argument("--record", action="store_true", help="keep the results under experiments/results/")


def _folder(text: str) -> Path:
    """A folder as typed. An address would become a folder of that name here, on a pod one of its own on each host."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is no folder: mount it, and name where it is mounted")
    return Path(text)


def _plan(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    plan = plan_experiment(
        arguments.paper,
        arguments.topology,
        _assignments(rest, ("--topology", "--programs", "--json")),
        arguments.programs,
        lambda line: print(line, file=sys.stderr),
    )
    if arguments.json:
        print(json.dumps(plan_json(plan), indent=1))
    else:
        print_plan(plan)
    return int(any(program.error or program.fits is False for program in plan.programs))


def _sweep(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    for option in ("strict", "record"):
        if getattr(arguments, option):
            raise UsageError(f"--{option} goes with a single run, not with a sweep")
    points = sweep_points(
        arguments.paper, _assignments(rest), arguments.sweep, arguments.workdir, overwrite=arguments.overwrite
    )
    if arguments.slurm:
        jobs = submit(points, points[0].workdir.parent / "slurm", arguments.slurm_option)
        print(f"queued {len(jobs)} runs as {jobs[0].job_id.partition('_')[0]}; results in {points[0].workdir.parent}")
        return 0
    failed = []
    for number, point in enumerate(points, 1):
        name = " ".join(point.overrides)
        print(f"[{number}/{len(points)}] {name}", file=sys.stderr)
        try:
            point()
        except EXPECTED as error:  # a seed that diverges must not cost the others
            if os.environ.get("JAXPAPERS_TRACEBACK"):
                raise
            print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
            failed.append(name)
    folder = points[0].workdir.parent
    print(f"{len(points) - len(failed)} runs in {folder}; python -m experiments report {folder}")
    if failed:
        raise UsageError(f"{len(failed)} of {len(points)} runs failed: {'; '.join(failed)}")
    return 0


def _run(target: str, arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    if initialize_distributed() and jax.process_index() == 0:
        print(
            f"{jax.process_count()} processes train together; if one is lost the others end (exit code 134), "
            "and the same command resumes",
            file=sys.stderr,
        )
    workdir, results = run_experiment(
        target, _assignments(rest), arguments.workdir, arguments.overwrite, arguments.record
    )
    if jax.process_index():
        return 0
    claims = results["claims"]
    Console().print(_claims_table(claims))
    held = sum(claim["status"] == "holds" for claim in claims)
    print(f"{held} of {len(claims)} claims hold ({results['seconds']:.0f} s); results and figures in {workdir}")
    return int(arguments.strict and any(claim["status"] == "fails" for claim in claims))


def _assignments(words: Sequence[str], options: Sequence[str] = _OPTIONS) -> list[str]:
    """`field=value` of each `--config.field=value` or `--config.field value`."""
    assignments = []
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            raise UsageError(f"unknown option {word!r}{nearest(word, options)}")
        if "=" not in word:
            if not words:
                raise UsageError(f"{word} needs a value, as in {word}=3")
            word = f"{word}={words.pop(0)}"
        assignments.append(word.removeprefix("--config."))
    return assignments


def _claims_table(claims: Sequence[dict[str, str]]) -> Table:
    table = Table("claim", "where", "paper", "ours", "", header_style="bold")
    colours = {"holds": "green", "fails": "red"}
    for claim in claims:
        status = claim["status"]
        colour = colours.get(status, "yellow")
        table.add_row(claim["id"], claim["where"], claim["paper"], claim["ours"], f"[{colour}]{status}[/]")
    return table
