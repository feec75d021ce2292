"""A learner's network: somebody's backbone and a read-out."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Module):
    """A backbone and a read-out of its features."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.backbone(x).flatten(1))
        return outputs


def tied_names(module: nn.Module) -> dict[str, str]:
    """Parameters that two modules share: further names, and the name in ``named_parameters``.

    ``functional_call`` could find them itself, but takes long over it, and leaves a module that has two places in the
    network with the parameters of the call.
    """
    first: dict[nn.Parameter, str] = {}
    owned = (
        (f"{prefix}.{name}" if prefix else name, value)
        for prefix, child in module.named_modules()
        for name, value in child._parameters.items()
        if value is not None
    )
    return {name: first[value] for name, value in owned if first.setdefault(value, name) != name}
