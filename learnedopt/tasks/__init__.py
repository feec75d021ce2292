"""What rules are trained and judged on: tasks, families of tasks, and the registry of families."""

from learnedopt.tasks.augment import LowPrecision, Mixture, RandomBatchSize, Reparametrized, ScaledLoss
from learnedopt.tasks.autoencoder import Autoencoder
from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily
from learnedopt.tasks.char_attention import CharAttention
from learnedopt.tasks.char_rnn import CharRNN
from learnedopt.tasks.conv import Conv
from learnedopt.tasks.conv_pool import ConvPool
from learnedopt.tasks.features import ConvFeatures, random_features, vgg16_features
from learnedopt.tasks.from_functions import FromFunctions
from learnedopt.tasks.ill_conditioned import IllConditioned
from learnedopt.tasks.lasso import Lasso
from learnedopt.tasks.logistic import Logistic
from learnedopt.tasks.matrix_factorization import MatrixFactorization
from learnedopt.tasks.mlp import MLP, MLPClassification
from learnedopt.tasks.networks import Networks
from learnedopt.tasks.piecewise_square import PiecewiseSquare
from learnedopt.tasks.quadratic import Quadratics
from learnedopt.tasks.random_mlp import RandomMLP
from learnedopt.tasks.rastrigin import Rastrigin
from learnedopt.tasks.regression import Regression
from learnedopt.tasks.rosenbrock import Rosenbrock
from learnedopt.tasks.sinusoid import Sinusoid
from learnedopt.tasks.softmax_regression import SoftmaxRegression
from learnedopt.tasks.style_transfer import StyleTransfer

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
    "conv_pool": ConvPool,
    "random_mlp": RandomMLP,
    "softmax_regression": SoftmaxRegression,
    "sinusoid": Sinusoid,
    "networks": Networks,
    "style_transfer": StyleTransfer,
    "ill_conditioned": IllConditioned,
    "piecewise_square": PiecewiseSquare,
    "lasso": Lasso,
    "rastrigin": Rastrigin,
    "rosenbrock": Rosenbrock,
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
    "ConvFeatures",
    "ConvPool",
    "FromFunctions",
    "IllConditioned",
    "Lasso",
    "Logistic",
    "LowPrecision",
    "MLPClassification",
    "MatrixFactorization",
    "Mixture",
    "Networks",
    "Params",
    "PiecewiseSquare",
    "Quadratics",
    "RandomBatchSize",
    "RandomMLP",
    "Rastrigin",
    "Regression",
    "Reparametrized",
    "Rosenbrock",
    "ScaledLoss",
    "Sinusoid",
    "SoftmaxRegression",
    "Split",
    "StyleTransfer",
    "Task",
    "TaskFamily",
    "random_features",
    "vgg16_features",
]
