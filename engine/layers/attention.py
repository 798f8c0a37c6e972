"""Self-attention over the paged KV: projections and rotation here, the memory behind `StepAttention`."""

from torch import Tensor, nn

from engine.attention.base import AttentionLayer, StepAttention
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Rotation
from engine.model_config import ModelConfig


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, index: int, *, normalizes_heads: bool = False) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = Linear(config.hidden_size, parts, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, {"o_proj": config.hidden_size}, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if normalizes_heads else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if normalizes_heads else None
        self.layer = AttentionLayer(
            index=index,
            scale=config.attention_scale,
            window=config.windows[index],
            softcap=config.attention_softcap,
        )

    def attend(self, x: Tensor, rotation: Rotation, attention: StepAttention) -> Tensor:
        """x [num_tokens, hidden_size] -> [num_tokens, num_heads * head_dim], for `o_proj`."""
        # [num_tokens, q heads then k heads then v heads, head_dim]
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = heads[:, : self.num_heads], heads[:, self.num_heads : -self.num_kv_heads]
            q.copy_(self.q_norm(q))
            k.copy_(self.k_norm(k))
        attention.rotate_and_store(self.layer, heads, rotation)
        return attention.attend(self.layer, heads[:, : self.num_heads])
