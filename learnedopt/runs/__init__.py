"""Training runs: folders, checkpoints, logs, clock and signals. They know nothing of what is trained."""

from learnedopt.runs.folder import Record
from learnedopt.runs.progress import Countdown, bar, lines, polite_signals
from learnedopt.runs.provenance import hardware, source_commit
from learnedopt.runs.recipes import home_of, load_file, load_python
from learnedopt.runs.run import OtherRunError, Run, Runnable, Stop, Trainable

__all__ = [
    "Countdown",
    "OtherRunError",
    "Record",
    "Run",
    "Runnable",
    "Stop",
    "Trainable",
    "bar",
    "hardware",
    "home_of",
    "lines",
    "load_file",
    "load_python",
    "polite_signals",
    "source_commit",
]
