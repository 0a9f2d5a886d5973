"""Models that no answer can be given for, refused with a word on what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from upweight.errors import ModelError

__all__ = ["refuse_renormalising", "refuse_train_mode", "refused_untaken", "unchanging"]


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether train mode makes a layer random, couple its rows or change its own statistics."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout > 0
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def refuse_train_mode(model: nn.Module) -> None:
    """Raise ModelError for a model in train mode with a layer that is random there."""
    for name, module in model.named_modules():
        if module.training and _depends_on_mode(module):
            raise ModelError(
                f"The model is in train mode and {name or 'it'} ({type(module).__name__}) is "
                "random or depends on the batch there. Call model.eval() first."
            )


def refuse_renormalising(model: nn.Module) -> None:
    """Raise ModelError for a layer that changes its own weights whenever it is used."""
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None and isinstance(
            module, (nn.Embedding, nn.EmbeddingBag)
        ):
            raise ModelError(
                f"{name or 'The model'} ({type(module).__name__}) has max_norm="
                f"{module.max_norm:g}: it changes its own weights in the forward pass, so that "
                "asking would change the model. Renormalise the table once, then set "
                "max_norm=None on the layer."
            )


@contextmanager
def unchanging(model: nn.Module) -> Iterator[None]:
    """Raise ModelError if what runs inside writes to a parameter or a stored buffer."""
    state = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    before = {name: value._version for name, value in state.items() if not value.is_inference()}
    yield
    changed = [name for name, version in before.items() if state[name]._version != version]
    if changed:
        raise ModelError(
            f"The model changes its own {', '.join(changed)} in the forward pass, so that asking "
            "changes what is asked. Call model.eval(), or switch the change off (max_norm=None in "
            "a lookup, momentum=0 of running averages)."
        )


# What torch says of a part of a model that ``torch.func`` cannot take, and what that is.
UNTAKEN = {
    "saved tensor hooks": "The model checkpoints its activations (torch.utils.checkpoint), and "
    "torch cannot differentiate that more than once, or for each example of an operation without a "
    "rule. Switch checkpointing off while explaining, as model.eval() does in many models, or use "
    "method='ekfac' with parameters in known layers.",
    "Cannot access data pointer": "The model has an operation that torch cannot differentiate more "
    "than once, as packed sequences (pack_padded_sequence) are. Pad and mask in place of packing, "
    "or use a method that takes first derivatives alone, as 'ekfac' or 'no_hessian'.",
    "setup_context": "The model has an autograd.Function of the old form, which torch cannot "
    "differentiate more than once. Give it setup_context and a differentiable backward, or use a "
    "method that takes first derivatives alone, as 'ekfac' or 'no_hessian'.",
}


@contextmanager
def refused_untaken() -> Iterator[None]:
    """A clear word for what ``torch.func`` cannot take."""
    try:
        yield
    except RuntimeError as error:
        for said, word in UNTAKEN.items():
            if said in str(error):
                raise ModelError(word) from error
        raise
