"""Rotary position embedding (arXiv:2104.09864) in the half-split form of Hugging Face checkpoints.

cos and sin are made once per step for the positions at hand and used by every layer; a table for every
position would cost 130 MB for a model of 128k positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model_config import RopeConfig


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos [num_tokens, 1, 1, half] and signed sin [num_tokens, 1, 2, half] of one step."""

    cos: Tensor
    sin: Tensor

    def apply_(self, heads: Tensor) -> None:
        """Rotate `heads` [num_tokens, num_heads, head_dim] in place."""
        half = self.cos.shape[-1]
        rotated = heads[..., : 2 * half].view(*heads.shape[:2], 2, half)
        swapped = rotated.flip(2)
        rotated.mul_(self.cos).addcmul_(swapped, self.sin)


class RotaryEmbedding:
    def __init__(self, config: RopeConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.frequencies = inverse_frequencies(config).to(device)
        self.attention_factor = config.attention_factor
        self.dtype = dtype

    def rotation(self, positions: Tensor) -> Rotation:
        """For `positions` [num_tokens], float32."""
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        signed = torch.stack((-sin, sin), dim=1)
        return Rotation(cos.to(self.dtype)[:, None, None], signed.to(self.dtype)[:, None])


def inverse_frequencies(config: RopeConfig) -> Tensor:
    """float32 [rotary_dim / 2], by the formulas of each scaling's authors as transformers applies them."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float() / config.rotary_dim
    frequencies = 1.0 / (config.theta**exponents)
    match config.kind:
        case "linear":
            return frequencies / config.factor
        case "llama3":
            return _llama3(frequencies, config)
        case "yarn":
            return _yarn(frequencies, config)
        case "longrope":
            return frequencies / torch.tensor(config.short_factors, dtype=torch.float32)
    return frequencies


def _llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    low, high, original = config.low_freq_factor, config.high_freq_factor, config.original_max_positions
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / config.factor + smooth * frequencies
    stretched = torch.where(wavelengths > original / low, frequencies / config.factor, between)
    return torch.where(wavelengths < original / high, frequencies, stretched)


def _yarn(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """A ramp over the dimensions from kept (fast rotation) to stretched by `factor` (slow rotation)."""

    def dimension(rotations: float) -> float:
        turns = config.original_max_positions / (rotations * 2 * math.pi)
        return config.rotary_dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    steps = torch.arange(config.rotary_dim // 2, dtype=torch.float32)
    ramp = ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return frequencies / config.factor * ramp + frequencies * (1 - ramp)
