"""What every decoder-only model shares: embedding, a stack of layers, the final norm and the head.

A family gives the layer; its module names are the checkpoint's own, so that loading needs no table. Tokens
of all sequences lie one after the other, without padding.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.base import AttentionLayer, StepAttention
from engine.layers.attention import SelfAttention
from engine.layers.linear import Linear, linear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryEmbedding
from engine.model_config import ModelConfig


class Embedding(nn.Module):
    def __init__(self, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)


class Stack(nn.Module):
    """The part of a checkpoint under `model.`"""

    def __init__(self, config: ModelConfig, layers: Sequence[nn.Module], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class CausalLM(nn.Module):
    """`make_layer(config, index)` gives modules with forward(hidden, delta, rotation, attention) -> delta.

    A layer first adds the `delta` of the one before it, None for the first, to `hidden` in place.

    Built under `torch.device`, in `dtype`, with its parameters unset until `engine.weights` loads them.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        make_layer: Callable[[ModelConfig, int], nn.Module],
        *,
        embedding_scale: float | None = None,
        unit_offset_norm: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding_scale = embedding_scale
        norm = RMSNorm(config.hidden_size, config.norm_eps, unit_offset=unit_offset_norm)
        self.model = Stack(config, [make_layer(config, index) for index in range(config.num_layers)], norm)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, {"lm_head": config.vocab_size})
        self.rotary = RotaryEmbedding(config.rope, dtype, torch.get_default_device())

    def forward(self, token_ids: Tensor, positions: Tensor, attention: StepAttention) -> Tensor:
        """token_ids and positions [num_tokens] -> hidden states before the final norm [num_tokens, hidden_size]."""
        rotation = self.rotary.rotation(positions)
        hidden: Tensor = self.model.embed_tokens(token_ids)
        if self.embedding_scale is not None:
            # Rounded to the model's type first, as in training.
            hidden *= torch.tensor(self.embedding_scale, dtype=hidden.dtype).item()
        delta: Tensor | None = None
        for layer in self.model.layers:
            delta = layer(hidden, delta, rotation, attention)
        assert delta is not None, "a model without layers"
        return hidden.add_(delta)

    def attention_layers(self) -> list[AttentionLayer]:
        return [module.layer for module in self.modules() if isinstance(module, SelfAttention)]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden_size], as `forward` gives it -> [num_rows, vocab_size]"""
        hidden = self.model.norm(hidden)
        if self.lm_head is not None:
            logits: Tensor = self.lm_head(hidden)
        else:
            logits = linear(hidden, self.model.embed_tokens.weight)
        if self.config.logit_softcap is not None:
            logits = logits.div_(self.config.logit_softcap).tanh_().mul_(self.config.logit_softcap)
        return logits
