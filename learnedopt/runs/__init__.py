"""Training runs: folders, checkpoints, logs, clock and signals. They know nothing of what is trained."""

from learnedopt.runs.folder import Record
from learnedopt.runs.progress import bar, lines, polite_signals
from learnedopt.runs.provenance import hardware, source_commit
from learnedopt.runs.recipes import load_file
from learnedopt.runs.run import OtherRunError, Run, Runnable, Stop, Trainable

__all__ = [
    "OtherRunError",
    "Record",
    "Run",
    "Runnable",
    "Stop",
    "Trainable",
    "bar",
    "hardware",
    "lines",
    "load_file",
    "polite_signals",
    "source_commit",
]
