"""What goes into a training loop: learned rules as ``torch.optim`` optimizers."""

from learnedopt.optim.lstm import LSTMOptimizer, MetaLSTMOptimizer
from learnedopt.optim.optimizer import LearnedOptimizer

__all__ = ["LSTMOptimizer", "LearnedOptimizer", "MetaLSTMOptimizer"]
