"""The command line of the jobs: flags from the fields of `Experiment`, errors as one line, documented exit codes.

Nothing below the jobs reads flags or raysed's environment variables; they are read here.
"""

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args

from raysed.config import Experiment, Field, SelectConfig, fields_of, load_config, with_overrides
from raysed.errors import RaysedError, UsageError
from raysed.experiments import PRESETS
from raysed.io.storage import Storage

SHORT = {
    "data.uri": "--data",
    "run": "--run",
    "model.arch": "--arch",
    "model.init": "--init",
    "select.strategy": "--select",
    "cycles": "--cycles",
    "seed": "--seed",
    "cluster.workers": "--workers",
    "cluster.scorers": "--scorers",
}
EXIT_CODES = """exit codes:
  0 done   1 internal error   2 bad usage or config   3 run directory held by another   4 data beyond the bad-tile budget
  5 training diverged   6 storage unreachable or refused   7 resources not available   8 waiting for labels
  130/143 interrupted by Ctrl-C/SIGTERM after a commit"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with the nearest flag, exit code 2."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(
            description=doc,
            epilog=EXIT_CODES,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help lists the flags)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parsed flags.

        Raises:
            UsageError: unknown flag, with the nearest name.
        """
        known, unknown = self.parse_known_args(list(argv))
        if unknown:
            flags = [o for action in self._actions for o in action.option_strings]
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, flags, n=1, cutoff=0.5)
            self.error(f"unknown argument {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        return known


def experiment_parser(doc: str | None, start: Experiment) -> Parser:
    """A parser with one flag a field of `Experiment`, --preset and --config; `start` gives the defaults shown."""
    parser = Parser(doc)
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="start from a named configuration; its strategy counts where it and the job are active",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="start from a JSON file of fields, such as a run's config.json"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would run where, its hours and cost, and run nothing"
    )
    parser.add_argument(
        "--tiles-per-second",
        type=float,
        metavar="N",
        help="training speed to reckon with in --dry-run (default: measured)",
    )
    parser.add_argument(
        "--price", type=float, metavar="N", help="price of the cluster an hour, for --dry-run"
    )
    for f in fields_of():
        _add(parser, f, _value(start, f.name))
    return parser


def _add(parser: Parser, f: Field, default: Any) -> None:
    dotted = "--" + f.name.replace("_", "-")
    flags = [SHORT[f.name]] + ([dotted] if dotted != SHORT[f.name] else []) if f.name in SHORT else [dotted]
    text = f"{f.doc} (default: {'none' if default is None else default})".replace("%", "%%")
    shown = (
        "|".join(str(a) for a in get_args(f.kind) if isinstance(a, str)) or f.name.rpartition(".")[2].upper()
    )
    if f.kind is bool:
        parser.add_argument(*flags, dest=f.name, nargs="?", const="true", metavar="BOOL", help=text)
    else:
        parser.add_argument(*flags, dest=f.name, metavar=shown, help=text)


def _value(experiment: Experiment, name: str) -> Any:
    node: Any = experiment
    for part in name.split("."):
        node = getattr(node, part)
    return node


def parse_experiment(args: argparse.Namespace, start: Experiment) -> tuple[Experiment, str | None]:
    """Experiment of the flags, over --config, --preset or `start`; and the name of the preset taken.

    RAYSED_DATA and RAYSED_RUN stand in for --data and --run.  With neither --data nor RAYSED_DATA, and no preset or config
    file, the preset `demo` is taken.
    """
    flags = {f.name: getattr(args, f.name) for f in fields_of() if getattr(args, f.name) is not None}
    for name, variable in (("data.uri", "RAYSED_DATA"), ("run", "RAYSED_RUN")):
        if os.environ.get(variable):
            flags.setdefault(name, os.environ[variable])
    preset = args.preset
    passive = SelectConfig().strategy
    if preset and passive in (start.select.strategy, PRESETS[preset].select.strategy):
        # train.py is passive and active.py active whatever the preset, which may say how active.py is
        flags.setdefault("select.strategy", start.select.strategy)
    if args.config:
        if preset:
            raise UsageError("--preset and --config exclude each other")
        folder, slash, name = args.config.rpartition("/")
        try:
            start = load_config(Storage(folder or slash or ".").read(name).decode(), args.config)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UsageError(f"--config {args.config}: No such file") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"--config {args.config}: not text ({error})") from error
    elif preset or "data.uri" not in flags:
        preset = preset or "demo"
        start = PRESETS[preset]
    if "data.uri" not in flags and start.data.uri is None and preset != "demo":
        raise UsageError(
            f"{'--config ' + args.config if args.config else '--preset ' + str(preset)} needs a tile store: "
            "give --data, or set RAYSED_DATA"
        )
    return with_overrides(start, flags, "flags"), preset


def main(job: Callable[[Sequence[str]], int | None]) -> NoReturn:
    """Run a job and exit with its code; errors raised on purpose become one line on standard error."""
    try:
        code = job(sys.argv[1:]) or 0
    except RaysedError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else 0
    except Exception:  # the edge: whatever was not foreseen is an internal error, with its traceback
        traceback.print_exc()
        print("error: internal error, please report it with the traceback above", file=sys.stderr, flush=True)
        code = 1
    sys.stdout.flush()
    sys.exit(code)
