"""What rules are trained and judged on: tasks, families of tasks, and the registry of families."""

from learnedopt.tasks.augment import Mixture, Reparametrized, ScaledLoss
from learnedopt.tasks.autoencoder import Autoencoder
from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily
from learnedopt.tasks.char_attention import CharAttention
from learnedopt.tasks.char_rnn import CharRNN
from learnedopt.tasks.conv import Conv
from learnedopt.tasks.logistic import Logistic
from learnedopt.tasks.matrix_factorization import MatrixFactorization
from learnedopt.tasks.mlp import MLP, MLPClassification
from learnedopt.tasks.quadratic import Quadratics
from learnedopt.tasks.regression import Regression

FAMILIES: dict[str, type[TaskFamily]] = {
    "quadratic": Quadratics,
    "mlp": MLPClassification,
    "regression": Regression,
    "autoencoder": Autoencoder,
    "logistic": Logistic,
    "char_rnn": CharRNN,
    "char_attention": CharAttention,
    "matrix_factorization": MatrixFactorization,
    "conv": Conv,
}
"""Every family by name; each is constructed without arguments."""

__all__ = [
    "FAMILIES",
    "MLP",
    "Autoencoder",
    "Batch",
    "CharAttention",
    "CharRNN",
    "Conv",
    "Logistic",
    "MLPClassification",
    "MatrixFactorization",
    "Mixture",
    "Params",
    "Quadratics",
    "Regression",
    "Reparametrized",
    "ScaledLoss",
    "Split",
    "Task",
    "TaskFamily",
]
