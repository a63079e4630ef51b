"""Reversible layers, Reformer: training keeps no layer's activations (Kitaev et al. 2020, arXiv 2001.04451, sec. 3).

After the reversible residual network (Gomez et al. 2017, 1707.04585). Two streams instead of one:

    Y1 = X1 + f(X2),   Y2 = X2 + g(Y1)        forward, f the attention, g the feed-forward network
    X2 = Y2 - g(Y1),   X1 = Y1 - f(X2)        backward computes the inputs again, from the last layer to the first

Only the last layer's Y1 and Y2 are kept. Each f and g is computed twice as often, about 4/3 of the operations of a
training step. What backward must find as forward had it: the random numbers of dropout (the generator's state is
kept, 5 kilobytes for each f and g), and discrete choices such as LSH buckets, which a rounding error in X2 could turn
over (the buckets are kept; a module that makes such a choice says so by `choice` and `fixed_choice`).
The values inside a feed-forward network, d_ff of them a token, are bounded by computing its positions in chunks.

NOTE the model's input is given to both streams, and its output is taken from both: the paper leaves open how. trax
and transformers concatenate them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from effnlp_lessons.attention.blocks import check_positive
from effnlp_lessons.transformer import FeedForward, MixerFactory, TransformerConfig, initialise_

# ------------------------------------------------------------------------------- to compute the same twice


class Circumstances(NamedTuple):
    """What one call of a module depended on beside its input and weights."""

    cpu_random_state: Tensor
    device_random_state: Tensor | None  # of the GPU that the input is on
    choices: tuple[Tensor | None, ...]  # of the parts that make one


def _choosers(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if hasattr(part, "fixed_choice")]


def _first_time(module: nn.Module, x: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Circumstances]:
    device_state = torch.cuda.get_rng_state(x.device) if x.is_cuda else None
    states = torch.get_rng_state(), device_state
    y = module(x, key_padding_mask)
    return y, Circumstances(*states, tuple(part.choice for part in _choosers(module)))


def _again(module: nn.Module, x: Tensor, key_padding_mask: Tensor | None, before: Circumstances) -> Tensor:
    """The module's output under the circumstances of the first time; the generators stay where they are."""
    choosers = _choosers(module)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.set_rng_state(before.cpu_random_state)
        if before.device_random_state is not None:
            torch.cuda.set_rng_state(before.device_random_state, x.device)
        try:
            for part, choice in zip(choosers, before.choices, strict=True):
                part.fixed_choice = choice
            return module(x, key_padding_mask)
        finally:
            for part in choosers:
                part.fixed_choice = None


# --------------------------------------------------------------------------------------- block and stack


class ReversibleBlock(nn.Module):
    """Y1 = X1 + f(X2), Y2 = X2 + g(Y1) (sec. 3).

    `f` and `g` are called as f(x, key_padding_mask) and return one tensor. On its own it keeps its activations like
    any module; a `ReversibleStack` does not.
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(
        self,
        x1: Float[Tensor, "batch length d_model"],
        x2: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], Float[Tensor, "batch length d_model"]]:
        y1 = x1 + self.f(x2, key_padding_mask)
        return y1, x2 + self.g(y1, key_padding_mask)

    def inverse(
        self,
        y1: Float[Tensor, "batch length d_model"],
        y2: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], Float[Tensor, "batch length d_model"]]:
        """X2 = Y2 - g(Y1), X1 = Y1 - f(X2) (sec. 3), up to rounding; f and g must draw no random numbers (`eval()`)."""
        x2 = y2 - self.g(y1, key_padding_mask)
        return y1 - self.f(x2, key_padding_mask), x2


class ReversibleStack(nn.Module):
    """Blocks one after another; backward computes every block's input again from its output (sec. 3).

    Memory for activations does not grow with the number of blocks, apart from the random states and choices
    (see the module's docstring). Gradients are those of the plain loop over the blocks, up to rounding; first
    gradients only, none of gradients.

    Raises:
        ValueError: no block, or one that is not a `ReversibleBlock`.
    """

    def __init__(self, blocks: Iterable[ReversibleBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if not len(self.blocks) or not all(isinstance(block, ReversibleBlock) for block in self.blocks):
            got = [type(block).__name__ for block in self.blocks]
            raise ValueError(f"blocks must be one or more ReversibleBlock, got {got}")

    def forward(
        self,
        x1: Float[Tensor, "batch length d_model"],
        x2: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], Float[Tensor, "batch length d_model"]]:
        """The last block's Y1 and Y2; a model gives its input as both `x1` and `x2`.

        Raises:
            ValueError: streams of different shapes.
        """
        if x1.shape != x2.shape:
            raise ValueError(f"x1 and x2 must have one shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
        return _Reversible.apply(self.blocks, key_padding_mask, x1, x2, *_trained(self))

    def inverse(
        self,
        y1: Float[Tensor, "batch length d_model"],
        y2: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], Float[Tensor, "batch length d_model"]]:
        """The input (x1, x2) of the stack, see `ReversibleBlock.inverse`."""
        for block in reversed(self.blocks):
            y1, y2 = block.inverse(y1, y2, key_padding_mask)
        return y1, y2


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class _Reversible(torch.autograd.Function):
    """The stack; the parameters are inputs, so that their gradients are handed out like any others."""

    @staticmethod
    def forward(
        ctx: Any, blocks: nn.ModuleList, key_padding_mask: Tensor | None, x1: Tensor, x2: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.blocks, ctx.key_padding_mask, ctx.circumstances = blocks, key_padding_mask, []
        for block in blocks:
            change, of_f = _first_time(block.f, x2, key_padding_mask)
            x1 = x1 + change
            change, of_g = _first_time(block.g, x1, key_padding_mask)
            x2 = x2 + change
            ctx.circumstances.append((of_f, of_g))
        ctx.save_for_backward(x1, x2)
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y1: Tensor, grad_y2: Tensor) -> tuple[Tensor | None, ...]:
        y1, y2 = ctx.saved_tensors
        found: dict[nn.Parameter, Tensor] = {}
        for block, (of_f, of_g) in zip(reversed(ctx.blocks), reversed(ctx.circumstances), strict=True):
            # X2 = Y2 - g(Y1); Y1 reaches the loss directly and through g
            change, grad = _pull_back(block.g, y1, grad_y2, ctx.key_padding_mask, of_g, found)
            y2, grad_y1 = y2 - change, grad_y1 + grad
            # X1 = Y1 - f(X2)
            change, grad = _pull_back(block.f, y2, grad_y1, ctx.key_padding_mask, of_f, found)
            y1, grad_y2 = y1 - change, grad_y2 + grad
        return None, None, grad_y1, grad_y2, *(found.get(parameter) for parameter in _trained(ctx.blocks))


def _pull_back(
    module: nn.Module,
    x: Tensor,
    grad_output: Tensor,
    key_padding_mask: Tensor | None,
    before: Circumstances,
    found: dict[nn.Parameter, Tensor],
) -> tuple[Tensor, Tensor]:
    """The module's output, computed again, and the gradient of its input; adds those of its parameters to `found`."""
    parameters = _trained(module)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = _again(module, x, key_padding_mask, before)
    grad_x, *grads = torch.autograd.grad(y, [x, *parameters], grad_output, allow_unused=True)
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            found[parameter] = found[parameter] + grad if parameter in found else grad
    return y.detach(), torch.zeros_like(x) if grad_x is None else grad_x


# ------------------------------------------------------------------------------------ what f and g are made of


class Branch(nn.Module):
    """An f or g of a Transformer: layer norm, a token or channel mixer of the course, dropout."""

    def __init__(self, config: TransformerConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mixer = mixer
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        y = self.mixer(self.norm(x), key_padding_mask)
        return self.dropout(y[0] if isinstance(y, tuple) else y)  # a token mixer also returns its state


def reversible_transformer(
    config: TransformerConfig, token_mixer: MixerFactory, channel_mixer: MixerFactory | None = None, seed: int = 0
) -> ReversibleStack:
    """A stack of `config.layers` blocks, f from `token_mixer`, g from `channel_mixer` (default: `FeedForward`).

    Linear weights are drawn from `seed`, as in the course's `Encoder`. `config.norm_first` is not looked at: f and g
    begin with a layer norm.
    """
    channel_mixer = channel_mixer or (lambda config, layer: FeedForward(config))
    stack = ReversibleStack(
        ReversibleBlock(Branch(config, token_mixer(config, layer)), Branch(config, channel_mixer(config, layer)))
        for layer in range(config.layers)
    )
    initialise_(stack, torch.Generator().manual_seed(seed))
    return stack


def chunked_feed_forward(
    channel_mixer: nn.Module, x: Float[Tensor, "batch length d_model"], chunks: int
) -> Float[Tensor, "batch length d_model"]:
    """A channel mixer on `chunks` parts of the positions, one after another (sec. 3, "Chunking").

    Positions do not see each other there, so the result is the whole one's. With gradients each chunk is computed
    again in backward, so that also there only one chunk's inner values (length / chunks * d_ff) exist at a time.

    Raises:
        ValueError: chunks that is no integer >= 1.
    """
    check_positive(chunks=chunks)
    return torch.cat([checkpoint(channel_mixer, part, use_reentrant=False) for part in x.chunk(chunks, dim=1)], dim=1)


class ChunkedFeedForward(nn.Module):
    """`chunked_feed_forward` as a channel mixer of the course.

    Raises:
        ValueError: chunks that is no integer >= 1.
    """

    def __init__(self, channel_mixer: nn.Module, chunks: int) -> None:
        super().__init__()
        check_positive(chunks=chunks)
        self.channel_mixer, self.chunks = channel_mixer, chunks

    def forward(
        self, x: Float[Tensor, "batch length d_model"], key_padding_mask: Tensor | None = None
    ) -> Float[Tensor, "batch length d_model"]:
        return chunked_feed_forward(self.channel_mixer, x, self.chunks)
