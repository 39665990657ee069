"""Models: sections 3.1 and 3.2, the generator, the critic with its two heads, and the classifier.

    python models.py                          # each network as a table, for the lost figures 4-6
    python models.py --cube 24 --width 4      # those of the demo

Cubes are (n, 1, z, y, x) in [-1, 1]. A cube's side is 3·2^k: 48 in the thesis, 24 in the demo.
The drawings are lost; tests/thesis/choices.md gives the reason for each layer.
"""

import argparse
import os
import signal
import sys
from typing import NamedTuple


def exit_interrupted(*_):
    """Say in one line that Ctrl-C has stopped `python models.py`, and end with status 130."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("\nlungaug: interrupted — run the same command again", file=sys.stderr, flush=True)
    os._exit(130)


# Importing torch takes a second, in which Ctrl-C would print a traceback. This file imports no
# other of ours, so it sees to that itself.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, exit_interrupted)

import torch
from torch import nn
from torch.nn import functional as F


CLASSES = 2

# The thesis gives no size of z. Section 3.1 of tests/thesis/choices.md says whose it is.
LATENT = 128

SIDES = (3, 6, 12, 24, 48, 96, 192)     # 3·2^k: the possible sides of a network's levels


def warm_up_mkl():
    """Call tanh once, on one thread, before any network runs.

    At its first call MKL chooses its code for this CPU, and two threads that make the first call at
    the same time may choose two kinds: the same seed would then give other bytes.
    """
    torch.tanh(torch.zeros(1))


warm_up_mkl()


def memory_layout(device):
    """The layout in memory with which a kind of device computes faster.

    A CPU's convolutions prefer channels last. On a GPU the group norm would undo it at each layer.
    """
    return torch.channels_last_3d if device.type == "cpu" else torch.contiguous_format


def channels_per_level(cube, width):
    """w·min(8, c/s) channels where a level's side is s = 3, 6, …, c   [rule_3_1_channels]

    Returns those of every level, smallest side first. Raises ValueError unless cube is 6, 12, …,
    192.
    """
    if cube not in SIDES[1:]:
        raise ValueError(f"a cube's side is one of {SIDES[1:]}, not {cube}")
    sides = [side for side in SIDES if side <= cube]
    return [width * min(8, cube // side) for side in sides]


# 3.1 Auxiliary classifier Wasserstein GAN

def one_hot(labels):
    """[0, 1] for a positive, [1, 0] for a negative   [rule_3_1_one_hot]

    labels: (n,). Returns (n, 2) float32.
    """
    return F.one_hot(labels, CLASSES).float()


def conditional_latent(noise, labels):
    """z₁…z_N ← one-hot(y), the rest of z ~ 𝒩(0, 1) as it was, N = 2   [rule_3_1_conditional_latent]

    noise: (n, 128); labels: (n,), 1 = positive. Returns a new (n, 128); `noise` is not changed.
    """
    return torch.cat([one_hot(labels).to(noise), noise[:, CLASSES:]], dim=1)


def draw_latent(labels, rng):
    """z ~ 𝒩(0, 1), its first two numbers overwritten by one-hot(y)   [rule_3_3_1_latent]

    labels: (n,), on any device; rng: a torch.Generator on the CPU. Returns (n, 128) on the labels'
    device. Training, generation and figures all draw their z here.
    """
    noise = torch.randn(len(labels), LATENT, generator=rng)
    return conditional_latent(noise.to(labels.device), labels)


def norm(channels):
    """(x − μ)/√(σ² + 10⁻⁵)·g + b, with μ and σ of one sample   [rule_3_1_layer_norm]

    μ and σ are over (c, z, y, x); there is one gain g and one bias b per channel, as in [9]'s own
    code.
    """
    # Group normalization with a single group is layer normalization with gains per channel.
    return nn.GroupNorm(1, channels)


def activation():
    """max(x, 0.2·x)   [rule_3_1_leaky_relu]"""
    return nn.LeakyReLU(0.2)


def conv(into, out, kernel=3):
    """A convolution that keeps the side: (n, into, s, s, s) → (n, out, s, s, s)."""
    return nn.Conv3d(into, out, kernel, padding=kernel // 2)


# 3.1.1 Residual block

def upsample(x):
    """Nearest neighbour: each voxel becomes 2×2×2   [rule_3_1_1_upsample]

    (n, c, s, s, s) → (n, c, 2s, 2s, 2s).
    """
    return F.interpolate(x, scale_factor=2, mode="nearest")


def downsample(x):
    """Average pooling: the mean of each 2×2×2   [rule_3_1_1_downsample]

    (n, c, 2s, 2s, 2s) → (n, c, s, s, s).
    """
    return F.avg_pool3d(x, 2)


def mean_of_shifts(weight):
    """The mean of a 3³ kernel's eight shifts by 0 or 1 along each axis, which is a 4³ kernel.

    (out, into, 3, 3, 3) → (out, into, 4, 4, 4). Along one axis the taps a, b, c become
    (a, a + b, b + c, c)/2.
    """
    padded = F.pad(weight, [1] * 6)
    return F.avg_pool3d(padded, 2, stride=1)


class UpsampleConv3d(nn.Conv3d):
    """conv 3³(upsample(x)) as one transposed convolution of stride 2.

    The result is the same, for 8/27 of the arithmetic: each voxel of x stands in 2×2×2 voxels of
    upsample(x), so the taps that would read the same voxel can be summed beforehand. Of nn.Conv3d
    it takes the weight, a 3³ kernel, and the bias; stride and padding are set in `forward`.
    """

    def forward(self, x):
        # Eight copies of a voxel add up: the sum of the shifts, not their mean. A transposed
        # convolution has its axes mirrored, and its channels in the other order.
        kernel = 8 * mean_of_shifts(self.weight).flip(2, 3, 4).transpose(0, 1)
        return F.conv_transpose3d(x, kernel, self.bias, stride=2, padding=1)


class ConvDownsample3d(nn.Conv3d):
    """downsample(conv 3³(x)) as one convolution of stride 2.

    The result is the same, for 8/27 of the arithmetic: the mean of a kernel's results at 2×2×2
    places is one result of the mean of its shifts. Of nn.Conv3d it takes weight and bias, as above.
    """

    def forward(self, x):
        return F.conv3d(x, mean_of_shifts(self.weight), self.bias, stride=2, padding=1)


class UpBlock(nn.Module):
    """x ↦ F(x) + skip(x) with the side doubled   [rule_3_1_1_residual_up]

    F: nearest ×2, conv 3³, LN, LReLU, conv 3³, LN, LReLU. skip: conv 1³, nearest ×2 (they commute;
    this order is the cheaper). (n, into, s, s, s) → (n, out, 2s, 2s, 2s).
    """

    def __init__(self, into, out):
        super().__init__()
        self.body = nn.Sequential(
            UpsampleConv3d(into, out, 3), norm(out), activation(),
            conv(out, out), norm(out), activation(),
        )
        self.skip = conv(into, out, kernel=1)

    def forward(self, x):
        return self.body(x) + upsample(self.skip(x))


class DownBlock(nn.Module):
    """x ↦ F(x) + skip(x) with the side halved   [rule_3_1_1_residual_down]

    F: conv 3³ to `middle` channels, LN, LReLU, conv 3³, mean pool 2, LN, LReLU. skip: mean pool 2,
    conv 1³. (n, into, 2s, 2s, 2s) → (n, out, s, s, s).
    """

    def __init__(self, into, middle, out):
        super().__init__()
        self.body = nn.Sequential(
            conv(into, middle), norm(middle), activation(),
            ConvDownsample3d(middle, out, 3), norm(out), activation(),
        )
        self.skip = conv(into, out, kernel=1)

    def forward(self, x):
        return self.body(x) + self.skip(downsample(x))


def at_least_float32(x):
    """x, or its float32 copy where autocast made it bfloat16.

    What leaves a network, voxels and scores, needs more than bfloat16's 7 bits of fraction.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Generator(nn.Module):
    """Latent (n, 128), conditional → cube (n, 1, c, c, c) in [-1, 1]   [rule_3_1_generator]

    Linear to 8w×3³, an up block for each doubling, conv 3³, tanh.
    """

    def __init__(self, cube, width):
        super().__init__()
        level_channels = channels_per_level(cube, width)
        self.linear = nn.Linear(LATENT, level_channels[0] * 27)
        self.start = nn.Unflatten(1, (level_channels[0], 3, 3, 3))
        self.blocks = nn.Sequential(*map(UpBlock, level_channels[:-1], level_channels[1:]))
        self.conv = conv(level_channels[-1], 1)

    def forward(self, z):
        x = self.start(self.linear(z))
        x = x.contiguous(memory_format=memory_layout(x.device))
        return torch.tanh(at_least_float32(self.conv(self.blocks(x))))


def critic_blocks(level_channels):
    """1 → w → 2w, then wᵢ → wᵢ → wᵢ₊₁: the cube itself enters the first   [rule_3_1_first_block]

    level_channels: of each level, the cube's own side first. Returns a DownBlock for each halving.
    At full size, where a convolution costs most, there is one alone, as in [9]'s own code.
    """
    first = DownBlock(1, level_channels[0], level_channels[1])
    inner = level_channels[1:-1]
    others = map(DownBlock, inner, inner, level_channels[2:])
    return [first, *others]


class Critic(nn.Module):
    """Cube (n, 1, c, c, c) → score f(x) (n,) and class logits (n, 2)   [rule_3_1_critic]

    A down block for each halving to side 3, then two linear heads on one trunk, neither with a norm
    or an activation. No layer mixes samples, or the penalty per sample would be wrong.
    """

    def __init__(self, cube, width):
        super().__init__()
        level_channels = channels_per_level(cube, width)[::-1]
        self.trunk = nn.Sequential(*critic_blocks(level_channels), nn.Flatten())
        self.score = nn.Linear(level_channels[-1] * 27, 1)
        self.logits = nn.Linear(level_channels[-1] * 27, CLASSES)

    def forward(self, x):
        trunk = self.trunk(x.contiguous(memory_format=memory_layout(x.device)))
        score = self.score(trunk)[:, 0]
        logits = self.logits(trunk)
        return at_least_float32(score), at_least_float32(logits)


# 3.2 Lung nodule detection classifier

class Classifier(nn.Sequential):
    """Cube (n, 1, c, c, c) → class logits (n, 2)   [rule_3_2_classifier]

    Conv 3³ of stride 2 and max pool 2 in turn until side 3, channels 16, 32, …; then linear 64 and
    linear 2. The activation comes after the pooling: it rises with its input, so the largest of
    eight stays the largest, and there is an eighth of the work.
    """

    def __init__(self, cube):
        layers = []
        into = 1
        out = 16
        halvings = len(channels_per_level(cube, 1)) - 1
        for halving in range(0, halvings, 2):
            layers.append(nn.Conv3d(into, out, 3, stride=2, padding=1))
            # Where the halvings are odd in number, the last convolution has no pool behind it.
            if halving + 1 < halvings:
                layers.append(nn.MaxPool3d(2))
            layers.append(activation())
            into = out
            out = 2 * out

        layers += [nn.Flatten(), nn.Linear(into * 27, 64), activation(), nn.Linear(64, CLASSES)]
        super().__init__(*layers)

    def forward(self, x):
        return super().forward(x.contiguous(memory_format=memory_layout(x.device)))


# Figures 4–6, as tables

class LayerRow(NamedTuple):
    """One layer of a network's table."""
    name: str
    layer: str          # in words: conv 3³ → mean pool 2
    shape: str          # of one sample's output: 2×6×6×6
    parameters: int


# A layer's kind in words; a convolution's is made of its numbers.
WORDS = {
    nn.Linear: "linear",
    nn.Unflatten: "reshape",
    nn.Flatten: "flatten",
    nn.GroupNorm: "layer norm",
    nn.LeakyReLU: "leaky ReLU",
    nn.MaxPool3d: "max pool 2",
}


def in_words(name, layer):
    """A layer in words, such as `conv 3³, stride 2`; a kind that is not ours as PyTorch says it.

    name: the layer's in its network; of a block's skip it ends with skip.
    """
    if not isinstance(layer, nn.Conv3d):
        return WORDS.get(type(layer), str(layer))

    words = f"conv {layer.kernel_size[0]}³"
    if isinstance(layer, UpsampleConv3d):
        words = f"nearest ×2 → {words}"
    elif isinstance(layer, ConvDownsample3d):
        words = f"{words} → mean pool 2"
    elif layer.stride[0] > 1:
        words = f"{words}, stride {layer.stride[0]}"
    return f"skip: {words}" if name.endswith("skip") else words


def layer_table(network, x):
    """A LayerRow for each layer that network(x) runs, in the order in which they run."""
    outputs = []

    def record(layer, inputs, output):
        outputs.append((layer, output))

    # Run the network once, with a hook that sees each layer's output.
    with torch.no_grad(), nn.modules.module.register_module_forward_hook(record):
        network(x)

    names = {layer: name for name, layer in network.named_modules()}
    rows = []
    for layer, output in outputs:
        # A layer that holds others is listed by those.
        if list(layer.children()):
            continue
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        shape = "×".join(str(side) for side in output.shape[1:])
        name = names[layer]
        rows.append(LayerRow(name, in_words(name, layer), shape, parameters))
    return rows


def print_layers(title, network, x):
    """Print a network's table under its title."""
    rows = layer_table(network, x)
    total = sum(row.parameters for row in rows)
    print(f"\n{title}: {total:,} parameters")
    print(f"{'name':<16}{'output':<16}{'parameters':>11}  layer")
    for row in rows:
        print(f"{row.name:<16}{row.shape:<16}{row.parameters:>11,}  {row.layer}")


def main():
    what, examples, _ = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(
        description=what, epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cube", type=int, default=48, choices=SIDES[1:],
                        help="side of the cube (default 48)")
    parser.add_argument("--width", type=int, default=16,
                        help="channels at full resolution (default 16)")
    options = parser.parse_args()
    if not 1 <= options.width <= 256:
        parser.error("--width is from 1 to 256")

    cube = torch.zeros(1, 1, options.cube, options.cube, options.cube)
    latent = torch.zeros(1, LATENT)
    width = options.width
    size = f"cube {options.cube}, width {width}"
    print_layers(f"Figure 4. Generator, {size}", Generator(options.cube, width), latent)
    print_layers(f"Figure 4. Critic, {size}", Critic(options.cube, width), cube)
    print_layers("Figure 5. Up block, from 2w to w channels, body + nearest ×2 of skip",
                 UpBlock(2 * width, width), torch.zeros(1, 2 * width, 3, 3, 3))
    print_layers("Figure 5. Down block, from w to 2w channels, body + skip of mean pool 2",
                 DownBlock(width, width, 2 * width), torch.zeros(1, width, 6, 6, 6))
    print_layers(f"Figure 6. Classifier, cube {options.cube}", Classifier(options.cube), cube)


if __name__ == "__main__":
    # A terminal whose encoding lacks × gets a ? in its place.
    sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output, such as head, has seen enough. What is still in a buffer would
        # fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
