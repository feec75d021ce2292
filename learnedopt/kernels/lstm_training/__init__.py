"""The LSTM of a rule as one differentiable operator, for meta-training."""

from learnedopt.kernels.lstm_training.training import NativeLSTM, fused

__all__ = ["NativeLSTM", "fused"]
