"""Linear layers: their products by oneDNN on a CPU, and their weights held ready while tokens are decoded."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

ONEDNN_FROM = 2**13  # weights of a product, more than which pay for kernels that oneDNN makes for each number of rows


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, (..., O) of (..., I) and (O, I), by oneDNN and without gradient."""
    try:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except RuntimeError as error:
        if weight.is_mkldnn or "could not create a primitive" not in str(error):
            raise
        return F.linear(x, weight, bias)  # there is no memory for a kernel, or no row


class Product(torch.autograd.Function):
    """`product` with its gradient.

    It takes 0.53 to 0.68 of the time of `F.linear`, backward included, on one AMD CPU with AVX-512, where the library
    behind that uses vectors half as wide, 0.7 to 1.2 on another; without AVX-512 0.9 to 1.2 (tests/bench_product.py).
    """

    @staticmethod
    def forward(x, weight, bias):
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, weight), (_, learns, biased) = ctx.saved_tensors, ctx.needs_input_grad
        inputs, grads, of_weight = x.flatten(0, -2), grad.flatten(0, -2), None
        if learns and grads.numel() <= inputs.numel() + weight.numel():  # the one with less to transpose
            of_weight = product(grads.t(), inputs.t())
        elif learns:
            of_weight = product(inputs.t(), grads.t()).t()
        return product(grad, weight.t()), of_weight, grads.sum(0) if biased else None


class Linear(nn.Linear):
    """A linear layer whose float32 product oneDNN computes on a CPU, if it pays for kernels made for the shape."""

    joined: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.joined is not None:
            return side_by_side(x, self)[0]
        plain = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        worth = self.weight.numel() > ONEDNN_FROM and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if plain and worth:
            return Product.apply(x, self.weight, self.bias)
        return super().forward(x)


def side_by_side(x: torch.Tensor, *layers: Linear) -> Sequence[torch.Tensor]:
    """What linear layers make of one input; one product while `prepacked` holds their weights together."""
    if layers[0].joined is None:
        return [layer(x) for layer in layers]
    weight, bias = layers[0].joined
    compute = product if weight.is_mkldnn else F.linear
    return compute(x.to(weight.dtype), weight, bias).split([layer.out_features for layer in layers], -1)


def can_prepack(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `prepacked` has an effect: on the float32 weights of a Llama, on a GPU or a CPU that knows the dtype."""
    if not hasattr(model, "products") or model.output_layer.weight.dtype != torch.float32:
        return False
    device = model.output_layer.weight.device.type
    if device == "cpu" and torch.backends.mkldnn.is_available():
        bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return dtype == torch.float32 or bfloat16
    return device == "cuda"


@contextlib.contextmanager
def prepacked(model: nn.Module, rows: int, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Hold the weights in `dtype`, those of one input together, on a CPU large ones ordered for about `rows` rows.

    Without gradient, where `can_prepack`; the output layer stays float32. Decoding reads all weights for each token:
    its products take 0.25 to 0.6 of the time of those with the weights as they are, which are ordered anew each time.
    """
    groups = model.products() if can_prepack(model, dtype) else []
    try:
        for layers in groups:
            kind = torch.float32 if layers[0] is model.output_layer else dtype
            weights = [layer.weight.detach().to(kind) for layer in layers]
            weight = torch.cat(weights) if len(layers) > 1 else weights[0]
            bias = None if layers[0].bias is None else torch.cat([layer.bias.detach().to(kind) for layer in layers])
            if weight.numel() > ONEDNN_FROM and weight.device.type == "cpu":
                weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            layers[0].joined = weight, bias
        yield
    finally:
        for layers in groups:
            layers[0].joined = None
