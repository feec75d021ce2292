"""Objectives that are neither plain classification nor plain regression: codes, embeddings, fields, graphs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.evaluation.tasks.base import RowsTask
from learnedopt.evaluation.tasks.sources import by_split, flat_images, graphs, letters, pixels, word_pairs
from learnedopt.tasks.base import Batch, Params, Task
from learnedopt.tasks.layers import init_mlp, mlp, weight


def vae(copies: int) -> Task:
    """A variational autoencoder of Greek letters: 144-48-(6 + 6), then 6-48-144; the negative evidence bound per pixel.

    Source: Kingma & Welling, *Auto-Encoding Variational Bayes*, 2013 (arXiv:1312.6114).
    """
    code = 6

    def initial(generator: Generator, copies: int) -> Params:
        encoder, decoder = (init_mlp(generator, copies, s) for s in ((144, 48, 2 * code), (code, 48, 144)))
        return {f"encode.{k}": v for k, v in encoder.items()} | {f"decode.{k}": v for k, v in decoder.items()}

    def augment(generator: Generator, batch: Batch) -> Batch:
        x, _ = batch
        return x, torch.randn(*x.shape[:2], code, generator=generator)

    def part(params: Params, name: str) -> Params:
        return {k.removeprefix(name): v for k, v in params.items() if k.startswith(name)}

    def objective(params: Params, batch: Batch) -> Tensor:
        x, noise = batch
        mean, log_variance = mlp(part(params, "encode."), x, "tanh").chunk(2, dim=-1)
        z = mean + torch.exp(0.5 * log_variance) * noise
        logits = mlp(part(params, "decode."), z, "tanh")
        reconstruction = (F.softplus(logits) - x * logits).sum(-1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        return (reconstruction + divergence).mean() / x.shape[-1]

    return RowsTask(copies, flat_images(letters("greek", 24)), 32, initial, objective, augment)


def siren(copies: int) -> Task:
    """Sine units fit a photograph as a function of the place, 2-40-40-3; mean squared error on random pixels.

    Source: Sitzmann et al., *Implicit Neural Representations with Periodic Activation Functions*, 2020
    (arXiv:2006.09661, section 3.2 for the initial weights).
    """
    frequency, width = 30.0, 40

    def initial(generator: Generator, copies: int) -> Params:
        params: Params = {}
        for i, (fan_in, fan_out) in enumerate(((2, width), (width, width), (width, 3))):
            bound = 1 / fan_in if i == 0 else (6 / fan_in) ** 0.5 / frequency
            params[f"{i}.weight"] = bound * (2 * torch.rand(copies, fan_in, fan_out, generator=generator) - 1)
            params[f"{i}.bias"] = bound * (2 * torch.rand(copies, fan_out, generator=generator) - 1)
        return params

    def objective(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        for i in range(2):
            x = torch.sin(frequency * (x @ params[f"{i}.weight"] + params[f"{i}.bias"]))
        return F.mse_loss(x @ params["2.weight"] + params["2.bias"], y)

    return RowsTask(copies, pixels(), 64, initial, objective)


def skip_gram(copies: int) -> Task:
    """Embeddings of 300 words, in and out, told from five random words each: most have no gradient in a step.

    Source: Mikolov et al., *Distributed Representations of Words and Phrases*, 2013 (arXiv:1310.4546, section 2.2).
    """
    words, width, negatives = 300, 16, 5

    def initial(generator: Generator, copies: int) -> Params:
        return {
            f"embedding.{name}": weight(generator, copies, words, width, fan_in=width, gain=0.5)
            for name in ("center", "context")
        }

    def augment(generator: Generator, batch: Batch) -> Batch:
        center, context = batch
        return center, context, torch.randint(words, (*center.shape, negatives), generator=generator)

    def objective(params: Params, batch: Batch) -> Tensor:
        center, context, other = batch
        vector = params["embedding.center"][center]
        true, false = (params["embedding.context"][index] for index in (context, other))
        scores_false = (false * vector[:, None]).sum(-1)
        return (F.softplus(-(vector * true).sum(-1)) + F.softplus(scores_false).sum(-1)).mean()

    return RowsTask(copies, word_pairs(words), 64, initial, objective, augment)


def contrastive(copies: int) -> Task:
    """An encoder 144-64-16 must tell which two noisy views are of one image among 24 Lao letters; InfoNCE.

    Views are shifted by up to a pixel and get noise; similarities are cosines over a temperature of 0.2.

    Source: Chen et al., *A Simple Framework for Contrastive Learning*, 2020 (arXiv:2002.05709).
    """
    images = flat_images(letters("lao", 30))
    rows = by_split(lambda name: images[name][:1])

    def initial(generator: Generator, copies: int) -> Params:
        return init_mlp(generator, copies, (144, 64, 16))

    def augment(generator: Generator, batch: Batch) -> Batch:
        (x,) = batch
        return tuple(view(generator, x) for _ in range(2))

    def view(generator: Generator, x: Tensor) -> Tensor:
        shift = [int(torch.randint(-1, 2, (), generator=generator)) for _ in range(2)]
        shifted = x.unflatten(-1, (12, 12)).roll(shift, dims=(-2, -1)).flatten(-2)
        return shifted + 0.2 * torch.randn(x.shape, generator=generator)

    def objective(params: Params, batch: Batch) -> Tensor:
        a, b = (F.normalize(mlp(params, x, "elu"), dim=-1) for x in batch)
        similarity = a @ b.T / 0.2
        which = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(similarity, which) + F.cross_entropy(similarity.T, which)) / 2

    return RowsTask(copies, rows, 24, initial, objective, augment)


def graph_wedges(copies: int) -> Task:
    """Three rounds of messages between the nodes of a graph, then a Poisson regression of its pairs of adjacent edges.

    The loss is half the deviance, the negative log-likelihood above that of the true count; its least value is zero.
    """
    width, rounds = 16, 3

    def initial(generator: Generator, copies: int) -> Params:
        params = {"enter": weight(generator, copies, width, fan_in=1, gain=0.5)}
        for i in range(rounds):
            params[f"{i}.message"] = weight(generator, copies, width, width, fan_in=width)
            params[f"{i}.own"] = weight(generator, copies, width, width, fan_in=width)
            params[f"{i}.bias"] = torch.zeros(copies, width)
        params["output"] = weight(generator, copies, width, 1, fan_in=width)
        params["output_bias"] = torch.zeros(copies, 1)
        return params

    def objective(params: Params, batch: Batch) -> Tensor:
        adjacency, count = batch
        h = params["enter"].expand(*adjacency.shape[:-1], width)
        for i in range(rounds):
            received = adjacency @ (h @ params[f"{i}.message"]) / adjacency.shape[-1]
            h = torch.tanh(received + h @ params[f"{i}.own"] + params[f"{i}.bias"])
        log_rate = h.mean(-2) @ params["output"] + params["output_bias"]
        log_rate = log_rate.squeeze(-1)
        return (log_rate.exp() - count + torch.xlogy(count, count) - count * log_rate).mean()

    return RowsTask(copies, graphs(), 32, initial, objective)
