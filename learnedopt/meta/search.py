"""Meta-training without gradients: a covariance matrix adaptation search over a few of a rule's weights."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learnedopt.meta.base import RuleTrainer
from learnedopt.meta.config import SearchConfig
from learnedopt.meta.evolution import flat_weights
from learnedopt.meta.generation import Trial
from learnedopt.rules import RuleConfig, UpdateRule, build_rule
from learnedopt.rules.legacy import modern_training
from learnedopt.runs import OtherRunError, Record, Stop
from learnedopt.tasks import Mixture
from learnedopt.tasks.base import TaskFamily

_SMOOTHING = 0.95
_LEAST_SLOPE = 0.04
_WORST, _BEST = -2.0, 1.5
_TURN = 1.0
"""Seconds of work between two questions whether to stop; steps that take longer are not cut."""
_PLACE = re.compile(r"(?P<name>[\w.]+)\[(?P<index>\d+(,\d+)*)\]")


class Search(RuleTrainer[SearchConfig]):
    r"""Covariance matrix adaptation evolution strategy over whole episodes.

    A generation draws one task from each family of a mixture and trains it, in ``copies`` copies, under every setting
    of the population at once: same start, same batches. With :math:`L_s(t)` the smoothed loss of setting :math:`s` at
    step t, averaged over copies, and :math:`L_0` that of the rule as it started, its *gain* on the task is the
    logarithm of how much faster it gets there, found from the slope of the start's own curve,

    .. math::
        g_s(t) = \frac{\log L_0(t) - \log L_s(t)}{\sigma(t)}, \qquad
        \sigma(t) = \frac{\log L_0(t/2) - \log L_0(t)}{\log 2}

    with :math:`\sigma` at least 0.04 and :math:`g` clipped to [-2, 1.5], 0.3 times that at a third of the horizon plus
    0.7 times that at its end. So every task counts alike, whether its loss falls by a percent or by orders of
    magnitude. The mean over tasks ranks the population. What comes out is the mean of the search's last distribution.

    For a handful of weights only, and for what backpropagation through short windows gets wrong: whole episodes are
    judged.

    Args:
        rule: Configuration of the rule; or a rule, with whose weights the others stay.
        family: A :class:`~learnedopt.tasks.Mixture`; its weights are not used.
        config: How to search.
        device: Where rule and optimizees live.

    Raises:
        ImportError: ``cma`` is missing.
        TypeError: the family is no mixture.
        ValueError: a coordinate names no weight of the rule, or two name the same.

    Source: Hansen & Ostermeier, "Completely derandomized self-adaptation in evolution strategies", 2001; the speed-up
    is akin to that of Metz et al. 2022 (arXiv:2211.09760), section 4.1.
    """

    backend = "reference"

    def __init__(
        self,
        rule: RuleConfig | UpdateRule,
        family: TaskFamily,
        config: SearchConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(family, Mixture):
            raise TypeError(f"a search draws from every family of a Mixture, got {type(family).__name__}")
        super().__init__(rule, config, device)
        self.family = family
        self.copies = config.copies
        self.rule.requires_grad_(False)
        self._places = torch.tensor([place(self.rule, name) for name, _, _ in config.coordinates])
        if len(set(self._places.tolist())) < len(self._places):
            raise ValueError("two of the coordinates are the same weight")
        self._start = flat_weights(self.rule)
        self._start[self._places] = torch.tensor([start for _, start, _ in config.coordinates]).to(self._start)
        self._scales = np.array([scale for _, _, scale in config.coordinates])
        self._scores: list[list[float]] = []
        """Of every generation so far, the gain of each of its settings: all that is needed to go on."""
        self._settings: NDArray[np.float64] | None
        """What the generation at work tries, once it was asked for."""
        self._gains: dict[int, NDArray[np.float64]]
        self._trials: dict[int, Trial]
        self._saved: dict[int, dict[str, Any]]  # of trials that have not gone on yet
        self._restart()

    @property
    def best_update(self) -> int:
        """The generation that the best rule comes out of: the last."""
        return self.update

    @property
    def parts(self) -> int:
        return len(self._gains)

    def records(self, stop: Stop) -> Iterator[Record]:
        """Search on, yielding one record per generation. ``stop`` is asked every second or every step.

        Within a generation listeners are told ``part``, the share of it that is done, and ``task``, the kind of the
        task at work; where that has been judged, ``gain``, the centre's on it, and ``start`` and ``end``, the losses of
        the start and of the centre after the last step.

        A record holds ``update``, ``meta_loss`` (minus the mean gain of the centre of the distribution that the
        generation was drawn from), ``gains`` (that centre's on each task), ``steps`` (inner steps, counted once per
        copy and setting), then of the distribution that came out of it ``std`` (in units of the scales) and ``center``
        (the weights there, less their start).
        """
        asked = False
        while not (self.finished or asked):
            if self._settings is None:
                self._settings = np.array(self._search.ask())
            tried = np.concatenate([np.zeros((1, len(self._scales))), self._search.mean[None], self._settings])
            weights = self._weights(tried * self._scales)
            while len(self._gains) < len(self.family.families) and not asked:
                asked = self._turn(weights, stop)
            if len(self._gains) < len(self.family.families):
                return
            gains = np.stack([self._gains[index] for index in range(len(self.family.families))])
            self._tell(self._settings, gains[:, 2:].mean(0).tolist())
            self.best_score = -float(gains[:, 1].mean())
            yield {
                "update": self.update,
                "meta_loss": self.best_score,
                "gains": [round(float(gain), 4) for gain in gains[:, 1]],
                "std": float(self._search.sigma),
                "steps": gains.size * self.config.copies * self.config.horizon,
                "center": [float(value) for value in self._search.mean * self._scales],
            }

    def best_rule(self) -> UpdateRule:
        """The rule at the centre of the distribution that came out of the last generation. It has not been judged."""
        rule = build_rule(self.rule.config).to(self._start.device).requires_grad_(False)
        weights = self._weights((self._search.mean * self._scales)[None])[0]
        torch.nn.utils.vector_to_parameters(weights, rule.parameters())
        return rule

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: the scores of all generations, from which the search is replayed.

        And, of the generation at work, what each task gave, and where those are that are being trained.
        """
        own = [{index: trial.state_dict() for index, trial in self._trials.items()}]
        trials = {index: state for states in self.ranks.collect(own) for index, state in states.items()}
        return {
            "gains": {index: torch.from_numpy(gains) for index, gains in self._gains.items()},
            "trials": trials,
            "config": self.config.to_dict(),
            "rule_config": self.rule.config.to_dict(),
            "scores": self._scores,
            "seconds": self.seconds,
            "best_score": self.best_score,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another search stood. Raises ``OtherRunError`` if it had other settings."""
        state = modern_training(state)
        for name, mine in (("config", self.config.to_dict()), ("rule_config", self.rule.config.to_dict())):
            if state.get(name) != mine:
                raise OtherRunError(f"the checkpoint was made with another {name}: {state.get(name)}, not {mine}")
        self._restart()
        for scores in state["scores"]:
            self._tell(np.array(self._search.ask()), scores)
        self._gains = {index: gains.numpy() for index, gains in state.get("gains", {}).items()}
        self._saved = dict(state.get("trials", {}))
        self.seconds, self.best_score = state["seconds"], state["best_score"]

    def _restart(self) -> None:
        self._search = _strategy(self.config)
        self._scores = []
        self.update = 0
        self._settings, self._gains, self._trials, self._saved = None, {}, {}, {}

    def _tell(self, settings: NDArray[np.float64], scores: list[float]) -> None:
        self._search.tell(list(settings), [-score for score in scores])
        self._scores.append(scores)
        self.update = len(self._scores)
        self._settings, self._gains, self._trials, self._saved = None, {}, {}, {}

    def _weights(self, changes: NDArray[np.float64]) -> Tensor:
        """All meta-parameters of each setting, ``(settings, P)``, for changes of the coordinates."""
        weights = self._start.repeat(len(changes), 1)
        weights[:, self._places] += torch.from_numpy(changes).to(weights)
        return weights

    def _turn(self, weights: Tensor, stop: Stop) -> bool:
        """Work on for :data:`_TURN` seconds; whether to stop. The first of ``weights`` is what others are judged by."""
        asked, until, judged = stop(), time.perf_counter() + _TURN, {}
        for index in self.ranks.mine(len(self.family.families)):
            if index in self._gains:
                continue
            if (trial := self._trials.get(index)) is None:
                family, seed = self.family.families[index], _seed(self.config, self.update, index)
                saved = self._saved.pop(index, None)
                trial = Trial(self.rule, family, weights, self.config.copies, seed, saved)
                self._trials[index] = trial
            while trial.done < self.config.horizon:
                trial.step()
                if time.perf_counter() > until:
                    break
            if trial.done == self.config.horizon:
                judged[index] = trial.curves()
                del self._trials[index]
            if time.perf_counter() > until:
                break
        going = max((trial.done for trial in self._trials.values()), default=0) / self.config.horizon
        turns = self.ranks.collect([(asked, judged, going, self.elapsed)])
        self.seconds = turns[0][3]
        for _, curves, *_ in turns:
            for index in curves:
                self._gains[index] = _gain(curves[index])
                self._say(index, 0.0, curves[index][-1])
        if len(self._gains) < len(self.family.families):
            self._say(max(self._trials, default=0), sum(share for _, _, share, _ in turns))
        return any(theirs for theirs, *_ in turns)

    def _say(self, index: int, going: float, ends: NDArray[np.float64] | None = None) -> None:
        judged: Record = {}
        if ends is not None:
            judged = {"gain": float(self._gains[index][1]), "start": float(ends[0]), "end": float(ends[1])}
        part = (len(self._gains) + going) / len(self.family.families)
        task = type(self.family.families[index]).__name__
        self.tell({"update": self.update + 1, "part": part, "task": task, **judged, "seconds": self.seconds})


def _seed(config: SearchConfig, update: int, index: int) -> int:
    return int(np.random.SeedSequence((config.seed, update, index)).generate_state(1, np.uint64)[0])


def _strategy(config: SearchConfig) -> Any:
    """The search at its start, as ``cma`` has it."""
    try:
        import cma
    except ImportError as error:
        raise ImportError("a search needs cma: pip install 'learnedopt[train]'") from error
    generator = torch.Generator().manual_seed(config.seed)

    def normal(*shape: int) -> NDArray[np.float64]:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).numpy()

    options = {"popsize": config.population, "randn": normal, "seed": math.nan, "verbose": -9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about options and plotting, from packages that cma looks for
        return cma.CMAEvolutionStrategy(np.zeros(len(config.coordinates)), config.std, options)


def place(rule: UpdateRule, coordinate: str) -> int:
    """Where a weight such as ``"readout.weight[0,9]"`` is among all meta-parameters, flattened in their order.

    Raises:
        ValueError: there is no such weight.

    >>> from learnedopt.rules import LSTMConfig, LSTMRule
    >>> rule = LSTMRule(LSTMConfig(hidden_size=2))
    >>> place(rule, "readout.bias[0]") == sum(weight.numel() for weight in rule.parameters()) - 1
    True
    """
    match, before = _PLACE.fullmatch(coordinate), 0
    for name, weight in rule.named_parameters():
        if match and name == match["name"]:
            index = tuple(int(number) for number in match["index"].split(","))
            if len(index) == weight.dim() and all(i < size for i, size in zip(index, weight.shape)):
                return before + int(np.ravel_multi_index(index, tuple(weight.shape)))
        before += weight.numel()
    known = ", ".join(f"{name} {tuple(weight.shape)}" for name, weight in rule.named_parameters())
    raise ValueError(
        f"{coordinate!r} names no weight; give a name and an index, as in readout.bias[0]. There are {known}"
    )


def _gain(curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """The gain of each setting from losses ``(steps, settings)``, as :class:`Search` has it."""
    curves = np.where(np.isfinite(curves), curves, 1e30)  # finite, so that two of them can be compared
    average = np.zeros(curves.shape[1])
    logs = np.empty_like(curves)
    for step, losses in enumerate(curves):
        average = _SMOOTHING * average + (1.0 - _SMOOTHING) * losses
        logs[step] = np.log(np.maximum(average / (1.0 - _SMOOTHING ** (step + 1)), 1e-12))
    total = np.zeros(curves.shape[1])
    for end, weight in ((len(curves) // 3, 0.3), (len(curves), 0.7)):
        here, half = logs[end - 1], logs[end // 2 - 1]
        slope = max(_LEAST_SLOPE, (half[0] - here[0]) / math.log(2.0))
        total += weight * np.clip((here[0] - here) / slope, _WORST, _BEST)
    return total
