"""The two LSTM optimizers of the literature."""

from __future__ import annotations

import torch

from learnedopt.optim.optimizer import LearnedOptimizer
from learnedopt.optim.sharding import copy_beside
from learnedopt.rules import LSTMRule, MetaLSTMRule


class LSTMOptimizer(LearnedOptimizer):
    r"""The LSTM optimizer of Andrychowicz et al.: every coordinate runs a small LSTM, with shared weights.

    :class:`LearnedOptimizer` for rules of kind ``"lstm"``; :class:`~learnedopt.rules.LSTMRule` has the formula. It is
    good near what its rule was trained on and has been seen to diverge elsewhere: read the card of the entry.

    Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", NeurIPS 2016
    (arXiv:1606.04474).

    >>> from learnedopt.rules import LSTMRule
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = LSTMOptimizer(model.parameters(), rule=LSTMRule())
    >>> model(torch.ones(3)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[model.weight]["h"].shape
    torch.Size([2, 20, 1, 3])
    """

    default_rule = "mnist-mlp"
    rule_class = LSTMRule


class MetaLSTMOptimizer(LearnedOptimizer):
    r"""The meta-LSTM of Ravi & Larochelle: gradient descent with learned forget and input gates.

    :class:`LearnedOptimizer` for rules of kind ``"meta_lstm"``; :class:`~learnedopt.rules.MetaLSTMRule` has the
    formula. A rule must be given: one is trained for one learner. It reads the training loss at every step, see
    :meth:`~LearnedOptimizer.step` and :meth:`~LearnedOptimizer.observe`.

    Source: Ravi & Larochelle, "Optimization as a model for few-shot learning", ICLR 2017, section 3.

    >>> from learnedopt.rules import MetaLSTMConfig, MetaLSTMRule
    >>> model = torch.nn.Linear(3, 1)
    >>> rule = MetaLSTMRule(MetaLSTMConfig(learner_shapes=((1, 3), (1,))))
    >>> optimizer = MetaLSTMOptimizer(model.parameters(), rule=rule)
    >>> optimizer.load_initialization()
    >>> model.weight.detach()
    tensor([[0., 0., 0.]])
    >>> loss = model(torch.ones(3)).square().sum()
    >>> loss.backward()
    >>> optimizer.step(loss=loss)
    """

    default_rule = None
    rule_class = MetaLSTMRule

    @torch.no_grad()
    def load_initialization(self) -> None:
        """Set the parameters to the starting values the rule has learned (the cell's initial state, c_0).

        Parameters are matched with the rule's ``learner_shapes`` in order, over all groups that run the rule.

        Raises:
            ValueError: the rule has learned none, or shapes differ. No parameter has changed then.
        """
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for sha256 in dict.fromkeys(group["rule_sha256"] for group in self.param_groups):
            groups = [group for group in self.param_groups if group["rule_sha256"] == sha256]
            params = [param for group in groups for param in group["params"]]
            rule = self._rules[sha256]
            assert isinstance(rule, MetaLSTMRule)
            initial = rule.initial_params
            if initial is None:
                raise ValueError(
                    f"the rule {groups[0]['rule']!r} has no learned initialization: its learner_shapes are empty"
                )
            expected, actual = ([tuple(tensor.shape) for tensor in tensors] for tensors in (initial, params))
            if expected != actual:
                raise ValueError(
                    f"the rule {groups[0]['rule']!r} initializes a learner of shapes {expected}, and the parameters "
                    f"have shapes {actual}"
                )
            pairs += zip(params, initial)
        for param, value in pairs:
            param.copy_(copy_beside(param, value, param.dtype))
