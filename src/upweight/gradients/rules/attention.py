"""``nn.MultiheadAttention``: its projections are taken out, the rest runs as it is."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.gradients.watch import Given, Watch, rule

__all__ = ["multi_head_attention", "projected"]

TAKES = {
    "query": None,
    "key": None,
    "value": None,
    "embed_dim_to_check": None,
    "num_heads": None,
    "in_proj_weight": None,
    "in_proj_bias": None,
    "bias_k": None,
    "bias_v": None,
    "add_zero_attn": None,
    "dropout_p": 0.0,
    "out_proj_weight": None,
    "out_proj_bias": None,
    "training": True,
    "key_padding_mask": None,
    "need_weights": True,
    "attn_mask": None,
    "use_separate_proj_weight": False,
    "q_proj_weight": None,
    "k_proj_weight": None,
    "v_proj_weight": None,
    "static_k": None,
    "static_v": None,
    "average_attn_weights": True,
    "is_causal": False,
}


def projected(watch: Watch, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map, watched."""
    out: Tensor = watch.__torch_function__(F.linear, (), (x, weight, bias))
    return out


def _thirds(watch: Watch, given: Given) -> list[Tensor]:
    """Queries, keys and values; one product where they come from one input."""
    inputs = (given.query, given.key, given.value)
    made: dict[int, tuple[Tensor, ...]] = {}
    for x in inputs:
        if id(x) not in made:
            out = projected(watch, x, given.in_proj_weight, given.in_proj_bias)
            made[id(x)] = out.chunk(3, dim=-1)
    return [made[id(x)][place] for place, x in enumerate(inputs)]


@rule(F.multi_head_attention_forward, takes=TAKES)
def multi_head_attention(watch: Watch, given: Given) -> Any:
    """Projections by the rule of linear maps, and attention between them with identities.

    Multiplying by an identity is exact, so the numbers are those of the user's module.
    """
    added = (given.bias_k, given.bias_v, given.static_k, given.static_v)
    if given.use_separate_proj_weight or any(part is not None for part in added):
        return given.run()
    query, key, value = _thirds(watch, given)
    eye = torch.eye(query.shape[-1], dtype=query.dtype, device=query.device)
    plain = {"in_proj_weight": torch.cat([eye] * 3), "in_proj_bias": None}
    plain |= {"out_proj_weight": eye, "out_proj_bias": None}
    mixed, weights = given.run({"query": query, "key": key, "value": value, **plain})
    return projected(watch, mixed, given.out_proj_weight, given.out_proj_bias), weights
