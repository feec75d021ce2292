"""The command line: ``learnedopt demo``, ``zoo``, ``meta-train``, ``benchmark``, ``fewshot``; a file for each."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from learnedopt import __version__
from learnedopt.cli import benchmark, demos, fewshot, meta_train, zoo
from learnedopt.fewshot import TrainingError
from learnedopt.meta import MetaTrainingError

_BROKEN_PIPE = 128 + 13  # the number of SIGPIPE, which Windows does not know


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 if all went well, 1 if meta-training failed, 2 if something asked for does not exist or makes no sense, 128 plus
    the signal's number if a signal stopped it, 141 (that of a broken pipe) if nobody reads the output any more.
    """
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if arguments.command in (meta_train.meta_train, zoo.zoo_train):
        arguments.more = more
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        status = int(arguments.command(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` has. Python writes the rest at exit: let it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (MetaTrainingError, TrainingError) as error:
        return _fail(error, 1)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="learnedopt", description="Learned optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"learnedopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (demos.add_demo, zoo.add, meta_train.add, benchmark.add, fewshot.add):
        add(commands)
    return parser


def _fail(error: Exception, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status
