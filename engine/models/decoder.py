"""What every decoder-only model shares: embedding, a stack of layers, the final norm and the head.

A family gives the layer; its module names are the checkpoint's own, so that loading needs no table. Tokens
of all sequences lie one after the other, without padding.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.base import AttentionLayer, StepAttention
from engine.layers.attention import SelfAttention
from engine.layers.linear import Linear, linear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryEmbedding, Rotation
from engine.model_config import ModelConfig


class Embedding(nn.Module):
    def __init__(self, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)


class DecoderLayer(nn.Module):
    """One layer in two parts: what every token needs, so that others can attend to it, and what only makes its output.

    What a block has to add to the residual stream `hidden` [num_tokens, hidden_size] is handed on as `delta`, so that
    adding it, in place, and the next norm are one operation.
    """

    @abstractmethod
    def attend(self, hidden: Tensor, delta: Tensor | None, rotation: Rotation, attention: StepAttention) -> Tensor:
        """Adds the `delta` of the layer before, None for the first -> [num_tokens, num_heads * head_dim]"""

    @abstractmethod
    def feed_forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """`attended` as `attend` gives it, or some rows of both -> delta, of the shape of `hidden`"""


class Stack(nn.Module):
    """The part of a checkpoint under `model.`"""

    def __init__(self, config: ModelConfig, layers: Sequence[DecoderLayer], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class CausalLM(nn.Module):
    """A decoder of the layers that `make_layer(config, index)` gives.

    Built under `torch.device`, in `dtype`, with its parameters unset until `engine.weights` loads them.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        make_layer: Callable[[ModelConfig, int], DecoderLayer],
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

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: StepAttention, rows: Tensor | None = None
    ) -> Tensor:
        """token_ids and positions [num_tokens] -> hidden states before the final norm [num_tokens, hidden_size].

        With `rows` only theirs, at least one: the last layer then spares the others all but their keys and values.
        """
        rotation = self.rotary.rotation(positions)
        hidden = self.embed(token_ids)
        attended: Tensor | None = None
        for index in range(len(self.model.layers)):
            attended = self.attend(index, hidden, attended, rotation, attention)
        assert attended is not None, "a model without layers"
        return self.finish(hidden, attended, rows)

    def attend(
        self, index: int, hidden: Tensor, attended: Tensor | None, rotation: Rotation, attention: StepAttention
    ) -> Tensor:
        """From the attention of the layer before, None for the first, to that of layer `index`, which is returned;
        `hidden` grows in place."""
        delta = None if attended is None else self._layer(index - 1).feed_forward(hidden, attended)
        return self._layer(index).attend(hidden, delta, rotation, attention)

    def finish(self, hidden: Tensor, attended: Tensor, rows: Tensor | None) -> Tensor:
        """What follows the last layer's attention, for `rows`; `hidden` may change. Returns what `forward` does."""
        if rows is not None:
            hidden, attended = hidden[rows], attended[rows]
        return hidden.add_(self._layer(-1).feed_forward(hidden, attended))

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [num_tokens] -> what the first layer is given [num_tokens, hidden_size]"""
        hidden: Tensor = self.model.embed_tokens(token_ids)
        if self.embedding_scale is not None:
            # Rounded to the model's type first, as in training.
            hidden *= torch.tensor(self.embedding_scale, dtype=hidden.dtype).item()
        return hidden

    def _layer(self, index: int) -> DecoderLayer:
        layer = self.model.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer

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
