"""Weights of penalties as policies: the coefficient as a function of the step.

A penalty takes a number or a policy: ``GradNorm(weight=match_sgd(lr_target=0.1, lr=optimizer))``. A step is a call of
``reg`` while it is active. A policy that knows the learning rate has ``weight / (lr / 4)`` reported: 1 is the penalty
that SGD at that learning rate carries implicitly (Smith, Dherin, Barrett, De 2021, arXiv:2101.12176).
"""

from fastreg.weights.base import Fixed, Rate, Weight, check_weight, current, fixed
from fastreg.weights.matching import match_sgd
from fastreg.weights.published import geiping, gnp
from fastreg.weights.schedules import schedule, warm_up

__all__ = [
    "Fixed",
    "Rate",
    "Weight",
    "check_weight",
    "current",
    "fixed",
    "geiping",
    "gnp",
    "match_sgd",
    "schedule",
    "warm_up",
]
