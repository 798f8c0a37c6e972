"""FP8 (e4m3) weights: a float32 scale per row of the weight, and products with activations that become FP8 on the way.

Used by `engine.layers.linear`. The format is that of OCP's 8-bit floating point specification: magnitudes up
to 448, no infinity.
"""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_SCALE = 1e-12  # of a row of zeros
SHAPE_MULTIPLE = 16  # what torch._scaled_mm asks of both sizes
FIRST_CAPABILITY = (8, 9)
# Elements of a product. On an H200 torch's product with scales per row takes 13 us at least, for small ones twice as
# long as the one without; a kernel that scales afterwards takes 1 to 3 us up to here, beyond more than it saves.
SCALED_AFTERWARDS = 1 << 21


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> FP8 of the same shape and scales [out]: each row's largest magnitude becomes 448."""
    scale = (weight.abs().amax(dim=1).float() / FP8_MAX).clamp_(min=SMALLEST_SCALE)
    scaled = (weight / scale[:, None]).clamp_(-FP8_MAX, FP8_MAX)  # float32
    return scaled.to(FP8), scale


def dequantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """FP8 weight [out, in] and scales [out] or [1] -> float32."""
    return weight.float().mul_(scale[:, None])


def why_not_fp8(
    device: torch.device, dtype: torch.dtype, num_rows: int, size: int, *, target: tuple[int, int] | None = None
) -> str | None:
    """What keeps a weight of this shape from being multiplied in FP8 on `device`, or None. `target`: on a GPU of this
    compute capability instead."""
    if target is None and device.type != "cuda":
        return f"device {device.type} has no FP8 products"
    if (target or torch.cuda.get_device_capability(device)) < FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(device) if target is None else "a GPU of {}.{}".format(*target)
        return f"{name} has no FP8 products"
    if dtype is not torch.bfloat16:
        return f"FP8 products give bfloat16, not {dtype}"
    if num_rows % SHAPE_MULTIPLE or size % SHAPE_MULTIPLE:
        return f"[{num_rows}, {size}] is not in multiples of {SHAPE_MULTIPLE}"
    return None


def fp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, one: Tensor, bias: Tensor | None
) -> Tensor:
    """x [num_tokens, in] bfloat16, weight [out, in] FP8, weight_scale [out] -> [num_tokens, out] bfloat16.

    `input_scale` is the checkpoint's, one float32; None scales each token by its own largest magnitude. `one` is a 1
    in float32 on the device, kept because making it would be a kernel of its own.
    """
    from engine.kernels.gemv import gemv
    from engine.kernels.quantize import quantize_rows, scale_product_

    if x.shape[0] == 1:
        return gemv(x, weight, bias, weight_scale)
    quantized, scales = quantize_rows(x, input_scale)
    if x.shape[0] * weight.shape[0] < SCALED_AFTERWARDS:
        product = scaled_mm(quantized, weight, one, one, x.dtype)
        scale_product_(product, scales, weight_scale, bias)
        return product
    # The bias is added here because cuBLAS has no product with scales per row and a bias for some shapes.
    product = scaled_mm(quantized, weight, scales, weight_scale[None], x.dtype)
    return product if bias is None else product.add_(bias)


def scaled_mm(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [num_tokens, in] and weight [out, in] in FP8, scales [] both, or [num_tokens, 1] and [1, out]."""
    product: Tensor = torch._scaled_mm(x, weight.t(), x_scale, weight_scale, out_dtype=dtype, use_fast_accum=True)
    return product
