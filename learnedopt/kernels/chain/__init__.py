"""Two rules in a row: the first moves nothing but a buffer, which is what the second takes for gradients."""

from learnedopt.kernels.core.registry import register
from learnedopt.rules import ChainRule

register(ChainRule, stepper="learnedopt.kernels.chain.step:step", parts="learnedopt.kernels.chain.step:parts")
