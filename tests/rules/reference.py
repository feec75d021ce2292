"""The rules once more, written from their formulas: one coordinate, one number at a time, in Python's floats.

They read a rule's configuration and weights and share no code with the package. A reference serves one copy of the
parameters: ``step`` takes parameters and gradients as one list of numbers per tensor and gives the changes likewise.
"""

from __future__ import annotations

import math
from typing import Any, cast

from learnedopt.rules import ChainRule, InEigenbases, SeparateLSTMRule, UpdateRule

Tensors = list[list[float]]


def sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def dot(x: list[float], y: list[float]) -> float:
    assert len(x) == len(y)
    return math.fsum(a * b for a, b in zip(x, y))


def mean(x: list[float]) -> float:
    return math.fsum(x) / len(x)


def log_sign(x: float, p: float) -> list[float]:
    if abs(x) >= math.exp(-p):
        return [math.log(abs(x)) / p, math.copysign(1.0, x)]
    return [-1.0, math.exp(p) * x]


class StackedLSTM:
    """The LSTM of a single coordinate, which remembers its own state."""

    def __init__(self, weights: dict[str, Any], hidden_size: int, num_layers: int) -> None:
        self.weights, self.hidden_size, self.num_layers = weights, hidden_size, num_layers
        self.h = [[0.0] * hidden_size for _ in range(num_layers)]
        self.c = [[0.0] * hidden_size for _ in range(num_layers)]

    def __call__(self, x: list[float]) -> list[float]:
        for layer in range(self.num_layers):
            input_weight = self.weights[f"lstm.input_weights.{layer}"]
            recurrent_weight = self.weights[f"lstm.recurrent_weights.{layer}"]
            bias = self.weights[f"lstm.biases.{layer}"]
            pre = [
                dot(input_weight[row], x) + dot(recurrent_weight[row], self.h[layer]) + bias[row]
                for row in range(4 * self.hidden_size)
            ]
            for unit in range(self.hidden_size):
                i, f, g, o = (pre[gate * self.hidden_size + unit] for gate in range(4))
                self.c[layer][unit] = sigmoid(f) * self.c[layer][unit] + sigmoid(i) * math.tanh(g)
                self.h[layer][unit] = sigmoid(o) * math.tanh(self.c[layer][unit])
            x = list(self.h[layer])
        return x


class Controller:
    """The LSTM of a single tensor, which corrects the features that its coordinates share."""

    def __init__(self, weights: dict[str, Any]) -> None:
        self.correction = weights["correction.weight"]
        own = {f"lstm.{name.removeprefix('controller.')}": value for name, value in weights.items()}
        self.lstm = StackedLSTM(own, len(weights["controller.biases.0"]) // 4, 1)

    def __call__(self, shared: list[float]) -> list[float]:
        top = self.lstm(shared)
        return [x + math.tanh(dot(row, top)) for x, row in zip(shared, self.correction)]


class Reference:
    def __init__(self, rule: UpdateRule, sizes: tuple[int, ...]) -> None:
        self.config = cast(Any, rule.config)
        weights = rule.state_dict().items()
        self.weights = {name.removeprefix("modulator."): weight.double().tolist() for name, weight in weights}
        num_layers = sum(name.startswith("lstm.biases.") for name in self.weights)
        units = len(self.weights["lstm.biases.0"]) // 4 if num_layers else 0
        self.lstms = [[StackedLSTM(self.weights, units, num_layers) for _ in range(n)] for n in sizes]

    def readout(self, name: str, row: int, x: list[float]) -> float:
        return dot(self.weights[f"{name}.weight"][row], x) + self.weights[f"{name}.bias"][row]

    def step(self, params: Tensors, grads: Tensors, loss: float) -> Tensors:
        raise NotImplementedError


class LSTMReference(Reference):
    def step(self, params: Tensors, grads: Tensors, loss: float) -> Tensors:
        return [[self.coordinate(t, j, g) for j, g in enumerate(grad)] for t, grad in enumerate(grads)]

    def coordinate(self, t: int, j: int, g: float) -> float:
        x = log_sign(g, self.config.preprocessing_p) if self.config.preprocessing == "log_sign" else [g]
        return float(self.config.output_scale) * self.readout("readout", 0, self.lstms[t][j](x))


class SeparateLSTMReference(LSTMReference):
    """Of vectors, which the second of its LSTMs serves."""

    def __init__(self, rule: UpdateRule, sizes: tuple[int, ...]) -> None:
        assert isinstance(rule, SeparateLSTMRule)
        super().__init__(rule.others, sizes)


class MetaLSTMReference(Reference):
    def __init__(self, rule: UpdateRule, sizes: tuple[int, ...]) -> None:
        super().__init__(rule, sizes)
        self.past = [[{"forget": 0.0, "input": 0.0} for _ in range(n)] for n in sizes]

    def step(self, params: Tensors, grads: Tensors, loss: float) -> Tensors:
        return [
            [self.coordinate(t, j, params[t][j], g, loss) for j, g in enumerate(grad)] for t, grad in enumerate(grads)
        ]

    def coordinate(self, t: int, j: int, theta: float, g: float, loss: float) -> float:
        g = g / self.config.gradient_divisor
        p = self.config.preprocessing_p
        h = self.lstms[t][j](log_sign(g, p) + log_sign(loss, p))
        gates = {}
        for name in ("forget", "input"):
            pre = self.readout(f"{name}_gate", 0, [*h, theta, self.past[t][j][name]])
            gates[name] = sigmoid(pre)
            self.past[t][j][name] = gates[name] if self.config.gate_feedback == "gate" else pre
        return gates["forget"] * theta - gates["input"] * g - theta


class AdamLSTMReference(Reference):
    def __init__(self, rule: UpdateRule, sizes: tuple[int, ...]) -> None:
        super().__init__(rule, sizes)
        self.fast, self.slow, self.square = ([[0.0] * n for n in sizes] for _ in range(3))
        self.time = 0

    def step(self, params: Tensors, grads: Tensors, loss: float) -> Tensors:
        self.time += 1
        return [self.tensor(t, param, grad) for t, (param, grad) in enumerate(zip(params, grads))]

    def tensor(self, t: int, param: list[float], grad: list[float]) -> list[float]:
        config = self.config
        a, b, g = [], [], []
        for j, value in enumerate(grad):
            self.fast[t][j] = self.average(self.fast[t][j], value, config.fast_decay)
            self.slow[t][j] = self.average(self.slow[t][j], value, config.slow_decay)
            self.square[t][j] = self.average(self.square[t][j], value**2, config.square_decay)
            d = math.sqrt(self.unbias(self.square[t][j], config.square_decay)) + config.eps
            a.append(self.unbias(self.fast[t][j], config.fast_decay) / d)
            b.append(self.unbias(self.slow[t][j], config.slow_decay) / d)
            g.append(value / d)
        shared = [
            clip(math.log(mean([x**2 for x in param]) + 1e-12) / 2, -7, 3) / 3,
            mean([x * y for x, y in zip(a, g)]),
            clip(math.log(mean([x**2 for x in b]) + 1e-12) / 2, -7, 3) / 3,
            math.log(min(self.time, config.max_time)) / math.log(config.max_time),
        ]
        return [self.coordinate(t, j, a[j], b[j], g[j], shared) for j in range(len(grad))]

    def coordinate(self, t: int, j: int, a: float, b: float, g: float, shared: list[float]) -> float:
        config = self.config
        h = self.lstms[t][j]([a, b, g, abs(a), abs(b), *shared])
        out = [self.readout("readout", row, h) for row in range(3)]
        log_step = config.log_step_bound * math.tanh(config.log_step_gain * out[0] / config.log_step_bound)
        mix = [config.mix_bound * math.tanh(o / config.mix_bound) for o in out[1:]]
        return float(-config.nominal_step * math.exp(log_step) * ((1.0 + mix[0]) * a + mix[1] * b))

    @staticmethod
    def average(old: float, new: float, decay: float) -> float:
        return decay * old + (1.0 - decay) * new

    def unbias(self, moment: float, decay: float) -> float:
        return moment / (1.0 - decay**self.time)


class ScheduleFreeReference(AdamLSTMReference):
    """Keeps the fast sequence and its average, as the paper has them, where the rule keeps their offset.

    Only their difference follows from the updates: given parameters need not be where the updates led.
    """

    def __init__(self, rule: UpdateRule, sizes: tuple[int, ...]) -> None:
        super().__init__(rule, sizes)
        self.z, self.x = ([[0.0] * n for n in sizes] for _ in range(2))
        self.origins: dict[int, list[float]] = {}
        self.slope, self.steepness, self.distance = ([0.0] * len(sizes) for _ in range(3))
        self.controllers = [Controller(self.weights) if "controller.biases.0" in self.weights else None for _ in sizes]

    def between(self, t: int, j: int) -> float:
        beta = self.config.interpolation
        return float(beta * self.x[t][j] + (1.0 - beta) * self.z[t][j])

    def tensor(self, t: int, param: list[float], grad: list[float]) -> list[float]:
        config = self.config
        a, g = [], []
        offset = [config.interpolation * (self.z[t][j] - self.x[t][j]) for j in range(len(grad))]
        for j, value in enumerate(grad):
            self.fast[t][j] = self.average(self.fast[t][j], value, config.momentum_decay)
            self.square[t][j] = self.average(self.square[t][j], value**2, config.square_decay)
            d = math.sqrt(self.unbias(self.square[t][j], config.square_decay)) + config.eps
            a.append(self.unbias(self.fast[t][j], config.momentum_decay) / d)
            g.append(value / d)
        way = [origin - value for origin, value in zip(self.origins.setdefault(t, list(param)), param)]
        for average, values in (
            (self.slope, [x * y for x, y in zip(grad, way)]),
            (self.steepness, [x**2 for x in grad]),
            (self.distance, [x**2 for x in way]),
        ):
            average[t] = self.average(average[t], mean(values), config.way_decay)
        correlation = self.slope[t] / math.sqrt(max(self.steepness[t], 1e-30) * max(self.distance[t], 1e-30))
        log_rms_param, log_rms_a, log_rms_offset = (
            math.log(mean([x**2 for x in values]) + 1e-12) / 2 for values in (param, a, offset)
        )
        rms_origin = math.sqrt(mean([x**2 for x in self.origins[t]]))
        small = clip(math.log(rms_origin / config.usual_scale), -7, 0) / 3 if rms_origin else 0.0
        rms_offset = max(math.sqrt(mean([x**2 for x in offset])), 1e-12)
        rms_a = max(math.sqrt(mean([x**2 for x in a])), 1e-12)
        shared = [
            clip(log_rms_param, -7, 3) / 3,
            mean([x * y for x, y in zip(a, g)]),
            clip(log_rms_a, -7, 3) / 3,
            -mean([x * y for x, y in zip(offset, a)]) / rms_offset / rms_a,
            clip(log_rms_offset - log_rms_param, -7, 3) / 3,
            math.log(min(self.time, config.max_time)) / math.log(config.max_time),
            math.tanh(config.way_gain * correlation),
            math.log(len(self.square)) / 3,
            small,
            math.exp(-(self.time - 1) / config.warmup),
        ]
        controller = self.controllers[t]
        if controller is not None:
            shared = controller(shared)
        inputs = [[a[j], g[j], abs(a[j]), offset[j] / rms_offset, *shared] for j in range(len(grad))]
        return [self.move(t, j, a[j], g[j], inputs[j]) for j in range(len(grad))]

    def move(self, t: int, j: int, a: float, g: float, inputs: list[float]) -> float:
        config = self.config
        h = self.lstms[t][j](inputs) if self.lstms[t][j].num_layers else []
        out = [self.readout("readout", row, [*inputs, *h]) for row in range(4)]
        log_step = config.log_step_bound * math.tanh(config.log_step_gain * out[0] / config.log_step_bound)
        mix = [config.mix_bound * math.tanh(o / config.mix_bound) for o in out[1:3]]
        bound, power = config.log_averaging_bound, config.averaging_power
        weight = (power + 1.0) / (self.time + power) * math.exp(bound * math.tanh(out[3] / bound))
        before = self.between(t, j)
        self.z[t][j] -= config.nominal_step * math.exp(log_step) * ((1.0 + mix[0]) * g + mix[1] * a)
        self.x[t][j] = self.average(self.z[t][j], self.x[t][j], min(weight, 1.0))
        return self.between(t, j) - before


class RNNpropReference(AdamLSTMReference):
    def tensor(self, t: int, param: list[float], grad: list[float]) -> list[float]:
        return [self.update(t, j, value) for j, value in enumerate(grad)]

    def update(self, t: int, j: int, value: float) -> float:
        config = self.config
        self.fast[t][j] = self.average(self.fast[t][j], value, config.momentum_decay)
        self.square[t][j] = self.average(self.square[t][j], value**2, config.square_decay)
        d = math.sqrt(self.unbias(self.square[t][j], config.square_decay)) + config.eps
        directions = [self.unbias(self.fast[t][j], config.momentum_decay) / d, value / d]
        seen = [self.readout("inputs", row, directions) for row in range(config.hidden_size)]
        h = self.lstms[t][j]([x if x > 0.0 else math.expm1(x) for x in seen])
        return float(-config.output_scale * math.tanh(self.readout("readout", 0, h)))


class EigenbasisReference(ScheduleFreeReference):
    """Of vectors, which have no bases. ``tests/rules/test_eigenbasis.py`` has the loop for matrices."""

    def __init__(self, rule: UpdateRule, sizes: tuple[int, ...]) -> None:
        assert isinstance(rule, InEigenbases)
        super().__init__(rule.inner, sizes)


class TensorReference(Reference):
    """One tensor after another."""

    def step(self, params: Tensors, grads: Tensors, loss: float) -> Tensors:
        return [self.tensor(t, param, grad) for t, (param, grad) in enumerate(zip(params, grads))]

    def tensor(self, t: int, param: list[float], grad: list[float]) -> list[float]:
        raise NotImplementedError


class NormalizedReference(TensorReference):
    def __init__(self, rule: UpdateRule, sizes: tuple[int, ...]) -> None:
        super().__init__(rule, sizes)
        self.squares, self.steps = [[0.0] * n for n in sizes], [0] * len(sizes)

    def tensor(self, t: int, param: list[float], grad: list[float]) -> list[float]:
        config = self.config
        self.steps[t] += 1
        floor = config.relative_eps**2 * mean([g**2 for g in grad])
        moves = []
        for j, g in enumerate(grad):
            h = g * g**2 / (g**2 + floor) if g else 0.0
            decay, square = config.square_decay, self.squares[t][j]
            self.squares[t][j] = decay * square + (1.0 - decay) * (h**2 + floor)
            rms = math.sqrt(self.squares[t][j] / (1.0 - decay ** self.steps[t]))
            moves.append(-h / (rms + config.eps))
        return moves


class LawsReference(TensorReference):
    """Keeps both sequences, as the paper has them, where the rule keeps their difference."""

    def __init__(self, rule: UpdateRule, sizes: tuple[int, ...]) -> None:
        super().__init__(rule, sizes)
        self.z, self.x = ([[0.0] * n for n in sizes] for _ in range(2))
        self.steps, self.origins = [0] * len(sizes), dict[int, list[float]]()
        self.slope, self.steepness, self.distance = ([0.0] * len(sizes) for _ in range(3))

    def place(self, step: int) -> float:
        config = self.config
        late = min(1.0, config.settling_time / max(step, 1)) ** config.settling_power
        return float((1.0 - config.interpolation) * late)

    def tensor(self, t: int, param: list[float], grad: list[float]) -> list[float]:
        return self.along(t, param, grad, grad)

    def along(self, t: int, param: list[float], grad: list[float], direction: list[float]) -> list[float]:
        config, keep = self.config, self.config.way_decay
        before, self.steps[t] = self.steps[t], self.steps[t] + 1
        step, origin = self.steps[t], self.origins.setdefault(t, list(param))
        way = [a - b for a, b in zip(origin, param)] if before else [0.0] * len(param)
        for average, values in (
            (self.slope, [a * b for a, b in zip(grad, way)]),
            (self.steepness, [a**2 for a in grad]),
            (self.distance, [a**2 for a in way]),
        ):
            average[t] = keep * average[t] + (1.0 - keep) * mean(values)
        correlation = self.slope[t] / math.sqrt(max(self.steepness[t], 1e-30) * max(self.distance[t], 1e-30))
        scale = math.sqrt(mean([a**2 for a in origin]))
        features = [
            1.0,
            math.log(min(step, config.max_time)),
            math.tanh(config.way_gain * correlation),
            math.log(len(self.steps)),
            clip(math.log(scale / config.usual_scale), -7.0, 0.0) if scale else 0.0,
            math.exp(-(step - 1) / config.warmup),
        ]
        bound = config.log_step_bound
        sigma = config.nominal_step * math.exp(bound * math.tanh(dot(self.weights["step_size"], features) / bound))
        bound, power = config.log_averaging_bound, config.averaging_power
        weight = (power + 1.0) / (step + power) * math.exp(bound * math.tanh(self.weights["averaging"][0] / bound))
        weight = min(1.0, weight)
        deltas = []
        for j, u in enumerate(direction):
            old = self.x[t][j] + self.place(before) * (self.z[t][j] - self.x[t][j])
            self.z[t][j] -= sigma * u
            self.x[t][j] += weight * (self.z[t][j] - self.x[t][j])
            deltas.append(self.x[t][j] + self.place(step) * (self.z[t][j] - self.x[t][j]) - old)
        return deltas


class ChainReference(TensorReference):
    def __init__(self, rule: UpdateRule, sizes: tuple[int, ...]) -> None:
        assert isinstance(rule, ChainRule)
        super().__init__(rule, sizes)
        first = rule.first.inner if isinstance(rule.first, InEigenbases) else rule.first
        self.first, self.then = NormalizedReference(first, sizes), LawsReference(rule.then, sizes)

    def tensor(self, t: int, param: list[float], grad: list[float]) -> list[float]:
        moves = self.first.tensor(t, param, grad)
        return self.then.along(t, param, grad, [-move for move in moves])


REFERENCES: dict[str, type[Reference]] = {
    "normalized_gradient": NormalizedReference,
    "laws": LawsReference,
    "chain": ChainReference,
    "lstm": LSTMReference,
    "meta_lstm": MetaLSTMReference,
    "adam_lstm": AdamLSTMReference,
    "schedule_free": ScheduleFreeReference,
    "in_eigenbases": EigenbasisReference,
    "rnnprop": RNNpropReference,
    "separate_lstm": SeparateLSTMReference,
}
