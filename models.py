"""Models: sections 3.1 and 3.2, the generator, the critic with its two heads, and the classifier.

    python models.py --cube 48 --width 16     # each network as a table of layers (the lost figures 4-6)

Cubes are (n, 1, z, y, x) in [-1, 1]. A cube's side is 3·2^k: 48 in the thesis, 24 in the demo.
The drawings are lost; README's table "Choices" gives the reason for each layer.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 2
LATENT = 128
CUBES = (6, 12, 24, 48, 96, 192)        # 3·2^k

torch.tanh(torch.zeros(1))      # alone: MKL picks its code at its first call, and for two threads at once may pick two


def channels(cube, width):
    """w·min(8, c/s) channels where a level's side is s = 3, 6, …, c   [rule_3_1_channels]

    Returns those of every level, smallest side first. Raises ValueError unless cube is one of CUBES.
    """
    if cube not in CUBES:
        raise ValueError(f"a cube's side is one of {CUBES}, not {cube}")
    return [width * min(8, cube // side) for side in (3, *CUBES) if side <= cube]


# 3.1 Auxiliary classifier Wasserstein GAN

def one_hot(labels):
    """[0, 1] for a positive, [1, 0] for a negative   [rule_3_1_one_hot]; labels (n,) → (n, 2) float32"""
    return F.one_hot(labels, CLASSES).float()


def conditional_latent(noise, labels):
    """z₁…z_N ← one-hot(y), the rest of z ~ 𝒩(0, 1) as it was, N = 2   [rule_3_1_conditional_latent]

    noise: (n, 128); labels: (n,), 1 = positive. Returns a new (n, 128); `noise` is left alone.
    """
    return torch.cat([one_hot(labels).to(noise), noise[:, CLASSES:]], dim=1)


def norm(channels):
    """(x − μ)/√(σ² + 10⁻⁵)·g + b; μ, σ over (c, z, y, x) of one sample, g, b per channel   [rule_3_1_layer_norm]"""
    return nn.GroupNorm(1, channels)    # one group is layer normalisation, with the gains of [9]'s own code


def activation():
    """max(x, 0.2·x)   [rule_3_1_leaky_relu]"""
    return nn.LeakyReLU(0.2)


def conv(into, out, kernel=3):
    """A convolution that keeps the side: (n, into, s, s, s) → (n, out, s, s, s)."""
    return nn.Conv3d(into, out, kernel, padding=kernel // 2)


# 3.1.1 Residual block

def upsample(x):
    """Nearest neighbour: each voxel becomes 2×2×2   [rule_3_1_1_upsample]; (n, c, s, s, s) → (n, c, 2s, 2s, 2s)"""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def downsample(x):
    """Average pooling: the mean of each 2×2×2   [rule_3_1_1_downsample]; (n, c, 2s, 2s, 2s) → (n, c, s, s, s)"""
    return F.avg_pool3d(x, 2)


def mean_of_shifts(weight):
    """The mean of a 3³ kernel's eight shifts by 0 or 1, a 4³ kernel; (out, into, 3, 3, 3) → (out, into, 4, 4, 4)"""
    return F.avg_pool3d(F.pad(weight, [1] * 6), 2, stride=1)


class UpsampleConv3d(nn.Conv3d):
    """conv 3³(upsample(x)) as one transposed convolution of stride 2: 8/27 of the arithmetic, the same result."""

    def forward(self, x):
        kernel = 8 * mean_of_shifts(self.weight).flip(2, 3, 4).transpose(0, 1)
        return F.conv_transpose3d(x, kernel, self.bias, stride=2, padding=1)


class ConvDownsample3d(nn.Conv3d):
    """downsample(conv 3³(x)) as one convolution of stride 2: 8/27 of the arithmetic, the same result."""

    def forward(self, x):
        return F.conv3d(x, mean_of_shifts(self.weight), self.bias, stride=2, padding=1)


class UpBlock(nn.Module):
    """x ↦ F(x) + skip(x) with the side doubled   [rule_3_1_1_residual_up]

    F: nearest ×2, conv 3³, LN, LReLU, conv 3³, LN, LReLU. skip: conv 1³, nearest ×2 (they commute; this order
    is the cheaper). (n, into, s, s, s) → (n, out, 2s, 2s, 2s).
    """

    def __init__(self, into, out):
        super().__init__()
        self.body = nn.Sequential(UpsampleConv3d(into, out, 3, padding=1), norm(out), activation(),
                                  conv(out, out), norm(out), activation())
        self.skip = conv(into, out, kernel=1)

    def forward(self, x):
        return self.body(x) + upsample(self.skip(x))


class DownBlock(nn.Module):
    """x ↦ F(x) + skip(x) with the side halved   [rule_3_1_1_residual_down]

    F: conv 3³, LN, LReLU, conv 3³, mean pool 2, LN, LReLU. skip: mean pool 2, conv 1³.
    (n, into, 2s, 2s, 2s) → (n, out, s, s, s).
    """

    def __init__(self, into, out):
        super().__init__()
        self.body = nn.Sequential(conv(into, into), norm(into), activation(),
                                  ConvDownsample3d(into, out, 3, padding=1), norm(out), activation())
        self.skip = conv(into, out, kernel=1)

    def forward(self, x):
        return self.body(x) + self.skip(downsample(x))


class Generator(nn.Module):
    """Latent (n, 128), conditional → cube (n, 1, c, c, c) in [-1, 1]   [rule_3_1_generator]

    Linear to 8w×3³, an up block for each doubling, conv 3³, tanh.
    """

    def __init__(self, cube, width):
        super().__init__()
        counts = channels(cube, width)
        self.linear = nn.Linear(LATENT, counts[0] * 27)
        self.start = nn.Unflatten(1, (counts[0], 3, 3, 3))
        self.blocks = nn.Sequential(*map(UpBlock, counts[:-1], counts[1:]))
        self.conv = conv(counts[-1], 1)

    def forward(self, z):
        x = self.start(self.linear(z)).contiguous(memory_format=torch.channels_last_3d)
        return torch.tanh(self.conv(self.blocks(x)))


def at_least_float32(x):
    """x, or its float32 copy where autocast made it bfloat16: a mean over the batch wants more than 8 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Critic(nn.Module):
    """Cube (n, 1, c, c, c) → score f(x) (n,) and class logits (n, 2)   [rule_3_1_critic]

    Conv 3³ with LN and LReLU, a down block for each halving to side 3, then two linear heads on one trunk,
    neither with a norm or an activation. No layer mixes samples, or the penalty per sample would be wrong.
    """

    def __init__(self, cube, width):
        super().__init__()
        counts = channels(cube, width)[::-1]
        self.trunk = nn.Sequential(conv(1, counts[0]), norm(counts[0]), activation(),
                                   *map(DownBlock, counts[:-1], counts[1:]), nn.Flatten())
        self.score, self.logits = nn.Linear(counts[-1] * 27, 1), nn.Linear(counts[-1] * 27, CLASSES)

    def forward(self, x):
        trunk = self.trunk(x.contiguous(memory_format=torch.channels_last_3d))
        return at_least_float32(self.score(trunk)[:, 0]), at_least_float32(self.logits(trunk))


# 3.2 Lung nodule detection classifier

class Classifier(nn.Sequential):
    """Cube (n, 1, c, c, c) → class logits (n, 2)   [rule_3_2_classifier]

    Conv 3³ of stride 2 and max pool 2 in turn until side 3, channels 16, 32, …; then linear 64 and linear 2.
    """

    def __init__(self, cube):
        layers, into, out = [], 1, 16
        for level in range(1, len(channels(cube, 1))):
            if level % 2 == 1:
                layers += [nn.Conv3d(into, out, 3, stride=2, padding=1), activation()]
                into, out = out, 2 * out
            else:
                layers += [nn.MaxPool3d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(into * 27, 64), activation(), nn.Linear(64, CLASSES))


# Figures 4–6, as tables

def layer_table(network, x):
    """Each layer that network(x) runs, in that order: (name, layer, shape of one sample's output, parameters)."""
    seen, names = [], {layer: name for name, layer in network.named_modules()}
    hook = nn.modules.module.register_module_forward_hook(lambda layer, _, output: seen.append((layer, output)))
    with torch.no_grad(), hook:
        network(x)
    return [(names[layer], str(layer), "×".join(map(str, output.shape[1:])), sum(p.numel() for p in layer.parameters()))
            for layer, output in seen if not list(layer.children())]


def main():
    parser = argparse.ArgumentParser(description="The networks, layer by layer: the lost figures 4–6.")
    parser.add_argument("--cube", type=int, default=48, choices=CUBES, help="the cube's side (default 48)")
    parser.add_argument("--width", type=int, default=16, help="channels at full size (default 16)")
    a = parser.parse_args()
    if not 1 <= a.width <= 256:
        parser.error("--width is from 1 to 256")
    cube = torch.zeros(1, 1, *[a.cube] * 3)
    generator, critic, classifier = Generator(a.cube, a.width), Critic(a.cube, a.width), Classifier(a.cube)
    for figure, network, x in ((4, generator, torch.zeros(1, LATENT)), (4, critic, cube), (6, classifier, cube)):
        rows = layer_table(network, x)
        size = f"cube {a.cube}" + f", width {a.width}" * (network is not classifier)
        print(f"\nFigure {figure}. {type(network).__name__}, {size}: {sum(row[-1] for row in rows):,} parameters")
        print(f"{'name':<16}{'output':<16}{'parameters':>11}  layer")
        for name, layer, shape, parameters in rows:
            print(f"{name:<16}{shape:<16}{parameters:>11,}  {layer}")


if __name__ == "__main__":
    main()
