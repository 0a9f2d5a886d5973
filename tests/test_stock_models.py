"""Language and vision models of Hugging Face as they come: no code but a loss."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import upweight as uw
from tests.test_layers import agrees, gap, looped
from upweight.gradients.capture import layout_of, observe
from upweight.objective import Objective

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

N, LENGTH, WORDS = 6, 5, 13


def next_token(outputs: Any, labels: Tensor) -> Tensor:
    """Mean loss of every text's counted tokens; labels are shifted."""
    losses = F.cross_entropy(outputs.logits.mT, labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1)


def texts(n: int) -> dict[str, Tensor]:
    ids = torch.randint(WORDS, (n, LENGTH))
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    labels[0, 2:] = -100
    return {"input_ids": ids, "labels": labels}


def masked(n: int) -> dict[str, Tensor]:
    mask = torch.ones(n, LENGTH, dtype=torch.long)
    mask[0, 3:] = 0
    return {"attention_mask": mask, **texts(n)}


def sentences(n: int) -> dict[str, Tensor]:
    data = masked(n)
    kinds = torch.randint(2, data["input_ids"].shape)
    return {**data, "token_type_ids": kinds, "labels": torch.randint(3, (n,))}


def pictures(n: int) -> dict[str, Tensor]:
    values = torch.randn(n, 3, 8, 8, dtype=torch.float64)
    return {"pixel_values": values, "labels": torch.randint(3, (n,))}


def gpt2(attention: str) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=8, n_embd=8, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(attention: str) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def vit(attention: str) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        image_size=8, patch_size=4, num_labels=3, attn_implementation=attention,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def bert(attention: str) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16, num_labels=3,
        attn_implementation=attention,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


@dataclass(frozen=True)
class Stock:
    """A model, its data and a loss."""

    model: Callable[[str], nn.Module]
    data: Callable[[int], dict[str, Tensor]]
    loss: Any

    def make(self, attention: str) -> nn.Module:
        torch.manual_seed(0)
        model = self.model(attention).double().eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        return model


STOCK = {
    "gpt2": Stock(gpt2, texts, next_token),
    "gpt2 masked": Stock(gpt2, masked, next_token),
    "gpt2 by name": Stock(gpt2, texts, "cross_entropy"),
    "llama": Stock(llama, texts, next_token),
    "llama by name": Stock(llama, masked, "cross_entropy"),
    "llama masked": Stock(llama, masked, next_token),
    "vit": Stock(vit, pictures, "cross_entropy"),
    "bert": Stock(bert, sentences, "cross_entropy"),
}


class Wide(TorchFunctionMode):
    """Leaves in float64 what a model would round to float32, as Llama does in its norms."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        args = [torch.float64 if x is torch.float32 else x for x in args]
        named = (kwargs or {}).items()
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in named}
        return func(*args, **kwargs)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", STOCK)
def test_gradients_are_those_of_a_loop(name, attention):
    stock = STOCK[name]
    model = stock.make(attention)
    objective = Objective(model, stock.loss)
    batch = objective.place(uw.Data.of(stock.data(N)).rows(0, N))
    with Wide():
        assert agrees(model, batch, loss=stock.loss) == frozenset()
    assert layout_of(objective, batch).general == frozenset()
    wanted = looped(objective, batch)
    assert gap(observe(objective, batch).gradients().dense(), wanted) < 1e-5


@pytest.mark.parametrize("name", STOCK)
def test_explained_with_no_code_but_a_loss(name):
    stock = STOCK[name]
    model = stock.make("sdpa")
    # The second derivative of a loss of one's own over whole texts is not taken.
    method = "ekfac" if isinstance(stock.loss, str) else "empirical_ekfac"
    influence = uw.Influence(model, stock.data(N), loss=stock.loss, l2=0.01, method=method)
    scores = influence.explain(stock.data(2))
    values = torch.as_tensor(scores.values)
    assert values.shape == (2, N)
    assert bool(torch.isfinite(values).all())
    assert bool(values.any())
    assert scores.provenance.coverage == 1.0


def test_tied_tables_are_one_parameter():
    """The token table of GPT-2 is its output layer: one block, both uses in it."""
    model = STOCK["gpt2"].make("eager")
    assert model.lm_head.weight is model.transformer.wte.weight
    objective = Objective(model, next_token)
    batch = objective.place(uw.Data.of(texts(N)).rows(0, N))
    gradients = observe(objective, batch).gradients()
    terms = dict(zip((b.name for b in gradients.blocks), gradients.terms, strict=True))
    assert len(terms["transformer.wte.weight"]) == 2
    assert "lm_head.weight" not in terms
    assert layout_of(objective, batch).seen
