"""The command line: ``learnedopt demo``, ``zoo``, ``meta-train``, ``benchmark``, ``fewshot``; a file for each."""

from __future__ import annotations

import argparse
import os
import pkgutil
import signal
import sys
from collections.abc import Sequence

from learnedopt import __version__

_COMMANDS = {
    "demo": ("demos:add_demo", "train small networks with the default rule, Adam and SGD, and compare"),
    "zoo": ("zoo:add", "the trained rules and few-shot learners that come with the package"),
    "meta-train": ("meta_train:add", "train a rule by a recipe, going on from where it stopped"),
    "benchmark": ("benchmark:add", "optimizers compared on sets of tasks, tuned and untuned"),
    "fewshot": ("fewshot:add", "few-shot learning: train, evaluate, compare"),
}
"""What adds each command to its parser, and what it is for. Only the file of the one that is called is imported."""
_BROKEN_PIPE = 128 + 13  # the number of SIGPIPE, which Windows does not know


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 if all went well, 1 if meta-training failed, 2 if something asked for does not exist or makes no sense, 128 plus
    the signal's number if a signal stopped it, 141 (that of a broken pipe) if nobody reads the output any more.
    """
    imports = argparse.ArgumentParser(prog="learnedopt", add_help=False, allow_abbrev=False)
    _add_import(imports)
    asked, argv = imports.parse_known_args(sys.argv[1:] if argv is None else argv)
    parser = _parser(next((word for word in argv if word in _COMMANDS), None))
    arguments, more = parser.parse_known_args(argv)
    if "more" in arguments:
        arguments.more = more
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        if asked.imports:
            from learnedopt.runs import load_python

            for name in asked.imports:
                load_python(name)
        status = int(arguments.command(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` has. Python writes the rest at exit: let it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except RuntimeError as error:
        from learnedopt.fewshot import TrainingError
        from learnedopt.meta import MetaTrainingError

        if not isinstance(error, MetaTrainingError | TrainingError):
            raise
        return _fail(error, 1)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="FILE_OR_MODULE",
        help="import this first, wherever it stands in the command: it defines rules or learners of your own kind",
    )


def _parser(called: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="learnedopt", description="Learned optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"learnedopt {__version__}")
    _add_import(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (home, help) in _COMMANDS.items():
        command = commands.add_parser(name, help=help)
        if name == called:
            pkgutil.resolve_name(f"learnedopt.cli.{home}")(command, help)
    return parser


def _fail(error: Exception, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status
