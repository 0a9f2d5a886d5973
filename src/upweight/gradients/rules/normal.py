"""Normalisations: the scale's gradient is g ∘ x̂, the shift's is g."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.gradients.rules.elementwise import own_use
from upweight.gradients.watch import Given, Watch, rule

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def _kept(watch: Watch, given: Given, features: int | None) -> Tensor:
    """Keep uses of scale and shift, over trailing axes or over the channels of axis 1."""
    out: Tensor = given.run()
    axis, count, channels = watch.axis, watch.count, features is None
    x, weight, bias = given.input.detach(), given.weight, getattr(given, "bias", None)
    plain = {"weight": None} | ({"bias": None} if hasattr(given, "bias") else {})

    def normalised() -> Tensor:
        with torch.no_grad():
            found: Tensor = given.run({"input": x, **plain})
        return found.movedim(1, 0) if axis == 1 else found

    def gathered(values: Tensor, shape: torch.Size) -> Tensor:
        if channels:
            values = values.flatten(2).sum(2) if values.dim() > 2 else values
        return values.reshape(count, -1, *shape).sum(1)

    uses = []
    for parameter, factor in ((weight, normalised), (bias, None)):
        source = watch.source(parameter)
        if source is not None:
            formed = _formed(gathered, factor, source.tensor.shape)
            uses.append(own_use(watch, source, formed))
    return watch.keep(out, uses, out.dim() - 1 if features is None else features)


def _formed(
    gathered: Callable[[Tensor, torch.Size], Tensor],
    factor: Callable[[], Tensor] | None,
    shape: torch.Size,
) -> Callable[[Tensor], Tensor]:
    return lambda slope: gathered(slope if factor is None else slope * factor(), shape)


AFFINE = {"weight": None, "bias": None}


@rule(F.layer_norm, takes={"input": None, "normalized_shape": None, **AFFINE, "eps": 1e-5})
def layer_norm(watch: Watch, given: Given) -> Tensor:
    """Over trailing axes."""
    return _kept(watch, given, len(given.normalized_shape))


@rule(F.rms_norm, takes={"input": None, "normalized_shape": None, "weight": None, "eps": None})
def rms_norm(watch: Watch, given: Given) -> Tensor:
    """Over trailing axes, without a shift."""
    return _kept(watch, given, len(given.normalized_shape))


@rule(F.group_norm, takes={"input": None, "num_groups": None, **AFFINE, "eps": 1e-5})
def group_norm(watch: Watch, given: Given) -> Tensor:
    """Over groups of channels."""
    return _kept(watch, given, None)


RUNNING = {"input": None, "running_mean": None, "running_var": None, **AFFINE}


@rule(F.batch_norm, takes={**RUNNING, "training": False, "momentum": 0.1, "eps": 1e-5})
def batch_norm(watch: Watch, given: Given) -> Tensor:
    """With running statistics; batch statistics couple rows and are refused before."""
    return _kept(watch, given, None)


@rule(F.instance_norm, takes={**RUNNING, "use_input_stats": True, "momentum": 0.1, "eps": 1e-5})
def instance_norm(watch: Watch, given: Given) -> Tensor:
    """Over the positions of each row and channel."""
    return _kept(watch, given, None)
