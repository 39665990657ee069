"""The networks of models.py as their formulas say: a layer after the other, no fast path, memory as it comes.

They hold the parameters of the network that they are made from. tests/test_models.py shows that both compute the same,
tests/bench_gan_step.py how much longer the plain ones take.
"""

import torch
from torch import nn
from torch.nn import functional as F


def upsample(x):
    """Each voxel becomes 2×2×2."""
    for axis in (2, 3, 4):
        x = x.repeat_interleave(2, axis)
    return x


def downsample(x):
    """The mean of each 2×2×2, axis by axis."""
    x = (x[:, :, 0::2] + x[:, :, 1::2]) / 2
    x = (x[:, :, :, 0::2] + x[:, :, :, 1::2]) / 2
    return (x[..., 0::2] + x[..., 1::2]) / 2


def conv(x, layer):
    """A convolution with the kernel of `layer` that keeps the side."""
    return F.conv3d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


def layer_norm(x, layer):
    """(x − μ)/√(σ² + 10⁻⁵)·g + b, μ and σ over a sample."""
    axes = (1, 2, 3, 4)
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    gain = layer.weight[:, None, None, None]
    bias = layer.bias[:, None, None, None]
    return (x - mean) / torch.sqrt(variance + 1e-5) * gain + bias


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


class PlainUpBlock(nn.Module):
    """conv(up(x)), LN, LReLU, conv, LN, LReLU, plus conv 1³(up(x))."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        first, first_norm, _, second, second_norm, _ = self.block.body
        x = upsample(x)
        y = leaky(layer_norm(conv(x, first), first_norm))
        y = leaky(layer_norm(conv(y, second), second_norm))
        return y + conv(x, self.block.skip)


class PlainDownBlock(nn.Module):
    """conv, LN, LReLU, down(conv), LN, LReLU, plus conv 1³(down(x))."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        first, first_norm, _, second, second_norm, _ = self.block.body
        y = leaky(layer_norm(conv(x, first), first_norm))
        y = leaky(layer_norm(downsample(conv(y, second)), second_norm))
        return y + conv(downsample(x), self.block.skip)


class PlainGenerator(nn.Module):
    """(n, 128) → (n, 1, c, c, c), with a generator's parameters."""

    def __init__(self, generator):
        super().__init__()
        self.linear = generator.linear
        self.blocks = nn.Sequential(*map(PlainUpBlock, generator.blocks))
        self.conv = generator.conv

    def forward(self, z):
        x = self.linear(z)
        x = x.reshape(len(z), -1, 3, 3, 3)
        return torch.tanh(conv(self.blocks(x), self.conv))


class PlainCritic(nn.Module):
    """(n, 1, c, c, c) → score (n,), logits (n, 2), with a critic's parameters."""

    def __init__(self, critic):
        super().__init__()
        blocks = [layer for layer in critic.trunk if not isinstance(layer, nn.Flatten)]
        self.blocks = nn.Sequential(*map(PlainDownBlock, blocks))
        self.score = critic.score
        self.logits = critic.logits

    def forward(self, x):
        trunk = self.blocks(x).flatten(1)
        return self.score(trunk)[:, 0], self.logits(trunk)
