"""Learned optimizers for PyTorch, with the interface of ``torch.optim``."""

from learnedopt.optim import LearnedOptimizer, LSTMOptimizer, MetaLSTMOptimizer
from learnedopt.zoo import list_entries, load_rule

__version__ = "0.1.0"

__all__ = ["LSTMOptimizer", "LearnedOptimizer", "MetaLSTMOptimizer", "list_entries", "load_rule"]
