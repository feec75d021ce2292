"""Rules in coordinates of their own for matrices, which follow gradients: taken there, moved, and taken back."""

from learnedopt.kernels.core.registry import register
from learnedopt.rules import InEigenbases

register(InEigenbases, stepper="learnedopt.kernels.bases.step:step", parts="learnedopt.kernels.bases.step:parts")
