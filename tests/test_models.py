"""Sections 3.1 and 3.2: the layers against their formulas, the networks against the rules they are built by.

    python -m pytest tests/test_models.py -v

Formulas are checked in float64 on (n, c, z, y, x) with unequal sides, so that a swapped axis shows.
"""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

import models
from losses import critic_loss, generator_loss
from models import (
    LATENT,
    Classifier,
    ConvDownsample3d,
    Critic,
    DownBlock,
    Generator,
    UpBlock,
    UpsampleConv3d,
    channels_per_level,
    conditional_latent,
    critic_blocks,
    downsample,
    layer_table,
    one_hot,
    upsample,
)
from plain_networks import PlainCritic, PlainGenerator


SHAPE = (2, 3, 4, 6, 8)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def shaken(network):
    """The network in float64 with every weight drawn anew, so that no gain is 1 and no bias 0 by chance."""
    for parameter in network.double().parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return network


def build(kind, cube, width=1):
    return kind(cube) if kind is Classifier else kind(cube, width)


def samples(kind, cube, n=3):
    """Random inputs of a network."""
    return random(n, LATENT) if kind is Generator else random(n, 1, cube, cube, cube)


def table(kind, cube, width=1):
    """layer_table of a network on one sample."""
    return layer_table(build(kind, cube, width), samples(kind, cube, 1).float())


def near(a, b, tolerance=1e-12):
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance


def kinds(kind, cube):
    """The kinds of the layers that a network runs, in words, in their order."""
    return [layer for _, layer, _, _ in table(kind, cube)]


# Channels

def test_rule_3_1_channels__by_hand():
    """w·min(8, c/s): 8w, 8w, 4w, 2w, w at sides 3, 6, 12, 24, 48 for 48; 8w, 4w, 2w, w for 24."""
    assert channels_per_level(48, 16) == [128, 128, 64, 32, 16]
    assert channels_per_level(24, 2) == [16, 8, 4, 2]


@pytest.mark.parametrize("cube, counts", [(48, (8, 8, 4, 2, 1)), (24, (8, 4, 2, 1))])
def test_rule_3_1_channels__of_every_level_that_runs(cube, counts):
    """The generator's levels have these channels at sides 3, 6, …, the critic's the same from the other end."""
    rising = [f"{2 * n}×{3 * 2 ** k}×{3 * 2 ** k}×{3 * 2 ** k}" for k, n in enumerate(counts)]
    up, down = ({name: shape for name, _, shape, _ in table(kind, cube, 2)} for kind in (Generator, Critic))
    blocks = range(len(counts) - 1)
    assert [up[name] for name in ("start", *(f"blocks.{i}.body.4" for i in blocks))] == rising
    names = ["trunk.0.body.0", *(f"trunk.{i}.body.4" for i in blocks)]
    assert [down[name] for name in names] == rising[::-1]


def test_channels_per_level__a_level_for_each_doubling_from_three():
    """3, 6, …, cube: two levels for 6, five for 48; narrower ones only where c/s is below 8."""
    assert (channels_per_level(6, 1), channels_per_level(48, 1)) == ([2, 1], [8, 8, 4, 2, 1])


@pytest.mark.parametrize("cube", [20, 3, 50, 0, -6, 36])
def test_channels_per_level__refuses_others(cube):
    """A cube that halvings do not bring to 3, or that is 3 itself, is turned away by its number."""
    with pytest.raises(ValueError, match=f"not {cube}$"):
        channels_per_level(cube, 1)


@pytest.mark.parametrize("build", [lambda: Generator(20, 1), lambda: Critic(50, 1), lambda: Classifier(3)])
def test_channels_per_level__guard_the_networks(build):
    """No network is built for such a cube."""
    with pytest.raises(ValueError):
        build()


# 3.1 The conditional latent

def test_rule_3_1_one_hot__positive_is_second():
    """[0, 1] encodes a positive, [1, 0] a negative."""
    assert one_hot(torch.tensor([1, 0, 1])).tolist() == [[0, 1], [1, 0], [0, 1]]


def test_rule_3_1_conditional_latent__one_hot_first():
    """The first two entries are [0, 1] for a positive, [1, 0] for a negative."""
    assert conditional_latent(random(2, LATENT), torch.tensor([1, 0]))[:, :2].tolist() == [[0, 1], [1, 0]]


def test_rule_3_3_1_latent__is_standard_normal():
    """Beyond the one-hot, z is drawn from 𝒩(0, 1), a new one for each sample (Kolmogorov–Smirnov)."""
    z = models.draw_latent(torch.ones(200, dtype=torch.int64), torch.Generator().manual_seed(3))
    assert stats.kstest(z[:, 2:].numpy().ravel(), "norm").pvalue > 0.01
    assert len(torch.unique(z[:, 2])) == 200


def test_rule_3_1_conditional_latent__the_rest_as_it_was():
    """The other 126 entries are the noise's own, bit for bit; 128 in all, of the noise's type."""
    noise = random(5, LATENT)
    latent = conditional_latent(noise, torch.tensor([0, 1, 1, 0, 1]))
    assert latent.shape == (5, 128) and latent.dtype == torch.float64 and torch.equal(latent[:, 2:], noise[:, 2:])


def test_rule_3_1_conditional_latent__noise_left_alone():
    """The input is not written over, nor shared with the result."""
    noise = random(3, LATENT)
    kept = noise.clone()
    conditional_latent(noise, torch.tensor([0, 1, 1])).fill_(7)
    assert torch.equal(noise, kept)


# Layer norm, activation

def test_rule_3_1_layer_norm__by_hand():
    """Channels hold 0 and 2: μ = 1, σ² = 1; gains 3 and 5, biases 7 and 11 → 7 − 3/√1.00001, 11 + 5/√1.00001."""
    norm = models.norm(2).double()
    norm.weight.data, norm.bias.data = torch.tensor([3.0, 5.0]).double(), torch.tensor([7.0, 11.0]).double()
    out = norm(torch.tensor([0.0, 2.0]).double().reshape(1, 2, 1, 1, 1)).flatten().tolist()
    assert out == pytest.approx([7 - 3 / math.sqrt(1.00001), 11 + 5 / math.sqrt(1.00001)], rel=1e-14)


def test_rule_3_1_layer_norm__formula():
    """(x − μ)/√(σ² + 10⁻⁵)·g + b with μ, σ² over (c, z, y, x) of one sample and g, b per channel."""
    norm, x = shaken(models.norm(3)), 5 * random(*SHAPE) + 2
    mean = x.sum((1, 2, 3, 4), keepdim=True) / (3 * 4 * 6 * 8)
    variance = ((x - mean) ** 2).sum((1, 2, 3, 4), keepdim=True) / (3 * 4 * 6 * 8)
    gain, bias = (p.reshape(1, 3, 1, 1, 1) for p in (norm.weight, norm.bias))
    assert near(norm(x), (x - mean) / (variance + 1e-5).sqrt() * gain + bias)


def test_rule_3_1_layer_norm__sees_one_sample():
    """Sample 0's result is the same, training or not, whatever stands beside it."""
    norm, x, other = shaken(models.norm(3)).train(), random(*SHAPE), random(*SHAPE)
    assert torch.equal(norm(x)[0], norm(torch.cat([x[:1], 9 * other]))[0])


@pytest.mark.parametrize("kind", [Generator, Critic])
def test_rule_3_1_layer_norm__the_only_norm(kind):
    """Every norm has one group for all channels; no batch norm, no instance norm."""
    found = [m for m in build(kind, 24, 2).modules() if "Norm" in type(m).__name__]
    assert len(found) == 6 and all(type(m) is nn.GroupNorm and m.num_groups == 1 for m in found)


UP = ["nearest ×2 → conv 3³", "layer norm", "leaky ReLU", "conv 3³", "layer norm", "leaky ReLU", "skip: conv 1³"]
DOWN = ["conv 3³", "layer norm", "leaky ReLU", "conv 3³ → mean pool 2", "layer norm", "leaky ReLU", "skip: conv 1³"]


def test_rule_3_1_layer_norm__where_the_generator_has_it():
    """After each convolution of a block, then LReLU; none after the linear, the skips and the last convolution."""
    assert kinds(Generator, 12) == ["linear", "reshape", *UP, *UP, "conv 3³"]


def test_rule_3_1_layer_norm__where_the_critic_has_it():
    """After each convolution of a block, then LReLU; none after the skips and the heads."""
    assert kinds(Critic, 12) == [*DOWN, *DOWN, "flatten", "linear", "linear"]


def test_rule_3_1_leaky_relu__by_hand():
    """max(x, 0.2·x): −5 → −1, 0 → 0, 3 → 3."""
    assert models.activation()(torch.tensor([-5.0, 0.0, 3.0]).double()).tolist() == [-1, 0, 3]


@pytest.mark.parametrize("kind", [Generator, Critic, Classifier])
def test_rule_3_1_leaky_relu__of_every_network(kind):
    """Every activation inside a network has slope 0.2."""
    found = [m for m in build(kind, 24).modules() if "ReLU" in type(m).__name__]
    assert found and all(type(m) is nn.LeakyReLU and m.negative_slope == 0.2 for m in found)


# 3.1.1 Residual block

def test_rule_3_1_1_upsample__each_voxel_becomes_eight():
    """Nearest ×2 is the Kronecker product with 2×2×2 ones."""
    x = random(*SHAPE).numpy()
    assert np.array_equal(upsample(torch.from_numpy(x)).numpy(), np.kron(x, np.ones((1, 1, 2, 2, 2))))


def test_rule_3_1_1_downsample__mean_of_eight():
    """Average pooling: each voxel is the mean of its own 2×2×2."""
    x = random(*SHAPE)
    corners = [x[:, :, i::2, j::2, k::2] for i, j, k in itertools.product((0, 1), repeat=3)]
    assert near(downsample(x), sum(corners) / 8, 1e-15)


def test_rule_3_1_1_downsample__undoes_upsample():
    """The mean of eight equal voxels is the voxel."""
    x = random(*SHAPE)
    assert near(downsample(upsample(x)), x, 2e-15)


def with_gradients(function, x, layer):
    """function(x) and the gradients of its sum against fixed weights in x and in the layer's parameters."""
    x = x.clone().requires_grad_()
    y = function(x)
    ways = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).sin()
    return [y, *torch.autograd.grad((y * ways).sum(), [x, layer.weight, layer.bias])]


def test_rule_3_1_1_residual_up__transposed_convolution_is_upsample_then_convolution():
    """UpsampleConv3d: values and the gradients in x, kernel and bias are those of conv 3³(upsample(x))."""
    layer, x = UpsampleConv3d(3, 5, 3).double(), random(*SHAPE)
    plain = lambda x: F.conv3d(upsample(x), layer.weight, layer.bias, padding=1)
    assert all(map(near, with_gradients(layer, x, layer), with_gradients(plain, x, layer)))


def test_rule_3_1_1_residual_down__strided_convolution_is_convolution_then_downsample():
    """ConvDownsample3d: values and the gradients in x, kernel and bias are those of downsample(conv 3³(x))."""
    layer, x = ConvDownsample3d(3, 5, 3).double(), random(*SHAPE)
    plain = lambda x: downsample(F.conv3d(x, layer.weight, layer.bias, padding=1))
    assert all(map(near, with_gradients(layer, x, layer), with_gradients(plain, x, layer)))


def layer_norm(x, norm):
    """F.layer_norm over (c, z, y, x), with the norm's gain and bias for each channel."""
    gain, bias = (p.reshape(-1, 1, 1, 1) for p in (norm.weight, norm.bias))
    return F.layer_norm(x, x.shape[1:]) * gain + bias


def three(x, layer):
    return F.conv3d(x, layer.weight, layer.bias, padding=1)


def test_rule_3_1_1_residual_up__formula():
    """LReLU(LN(conv(LReLU(LN(conv(up(x))))))) + up(conv 1³(x)), from plain parts."""
    block, x = shaken(UpBlock(3, 5)), random(*SHAPE)
    h = F.leaky_relu(layer_norm(three(upsample(x), block.body[0]), block.body[1]), 0.2)
    h = F.leaky_relu(layer_norm(three(h, block.body[3]), block.body[4]), 0.2)
    skip = torch.einsum("oi,nizyx->nozyx", block.skip.weight[:, :, 0, 0, 0],
                        upsample(x)) + block.skip.bias.reshape(-1, 1, 1, 1)
    assert near(block(x), h + skip)


def test_rule_3_1_1_residual_down__formula():
    """LReLU(LN(down(conv(LReLU(LN(conv(x))))))) + conv 1³(down(x)), from plain parts."""
    block, x = shaken(DownBlock(3, 4, 5)), random(*SHAPE)
    h = F.leaky_relu(layer_norm(three(x, block.body[0]), block.body[1]), 0.2)
    h = F.leaky_relu(layer_norm(downsample(three(h, block.body[3])), block.body[4]), 0.2)
    skip = torch.einsum("oi,nizyx->nozyx", block.skip.weight[:, :, 0, 0, 0],
                        downsample(x)) + block.skip.bias.reshape(-1, 1, 1, 1)
    assert near(block(x), h + skip)


def weight_gradients(loss, network):
    """A loss and its gradients in the network's parameters, side by side in one vector."""
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)])


@pytest.mark.parametrize("cube, width", [(6, 3), (12, 2), (24, 1)])
def test_rule_3_1_critic__fast_paths_change_no_loss_and_no_gradient(cube, width):
    """L_f and its gradients in the critic's weights, the penalty's second derivatives with them, are the plain
    formulas' within 1e-12 of the largest."""
    critic = shaken(Critic(cube, width))
    real, fake = samples(Critic, cube, 4), samples(Critic, cube, 4)
    labels, fake_labels = torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 1, 0])
    epsilon = torch.tensor([0.0, 0.3, 0.8, 1.0]).double()

    def gradients(network):
        loss = critic_loss(network, real, labels, fake, fake_labels, epsilon, 10, 3).total
        return weight_gradients(loss, critic)

    expected = gradients(PlainCritic(critic))
    assert near(gradients(critic), expected, 1e-12 * expected.abs().max())


@pytest.mark.parametrize("cube, width", [(6, 3), (12, 2), (24, 1)])
def test_rule_3_1_generator__fast_paths_change_no_loss_and_no_gradient(cube, width):
    """L_G and its gradients in the generator's weights are the plain formulas' within 1e-12 of the largest."""
    generator, critic = shaken(Generator(cube, width)), shaken(Critic(cube, width))
    z, labels = samples(Generator, cube, 4), torch.tensor([0, 1, 1, 0])

    def gradients(make, judge):
        return weight_gradients(generator_loss(judge, make(z), labels, 3).total, generator)

    expected = gradients(PlainGenerator(generator), PlainCritic(critic))
    assert near(gradients(generator, critic), expected, 1e-12 * expected.abs().max())


def silenced(block):
    """The block with F = 0: its last norm has gain and bias 0, so only the skip is left."""
    for parameter in (block.body[4].weight, block.body[4].bias, block.skip.bias):
        nn.init.zeros_(parameter)
    block.skip.weight.data = torch.eye(3).double().reshape(3, 3, 1, 1, 1)
    return block


def test_rule_3_1_1_residual_up__skip_carries_the_input():
    """Where F = 0 and the 1³ convolution is the identity, the block is nearest ×2."""
    x = random(*SHAPE)
    assert torch.equal(silenced(UpBlock(3, 3).double())(x), upsample(x))


def test_rule_3_1_1_residual_down__skip_carries_the_input():
    """Where F = 0 and the 1³ convolution is the identity, the block is the mean pool."""
    x = random(*SHAPE)
    assert torch.equal(silenced(DownBlock(3, 2, 3).double())(x), downsample(x))


# The generator

@pytest.mark.parametrize("cube", [12, 24, 48])
def test_rule_3_1_generator__shape(cube):
    """(n, 128) → (n, 1, c, c, c), float32."""
    cubes = Generator(cube, 1)(torch.randn(2, 128))
    assert cubes.shape == (2, 1, cube, cube, cube) and cubes.dtype == torch.float32


def test_rule_3_1_generator__tanh_of_the_last_convolution():
    """Its output is tanh = (eᵃ − e⁻ᵃ)/(eᵃ + e⁻ᵃ) of a convolution 3³ to one channel."""
    generator, seen = Generator(6, 1).double(), []
    generator.conv.register_forward_hook(lambda layer, x, a: seen.append(a))
    cubes, (a,) = generator(random(2, LATENT)), seen
    assert near(cubes, (a.exp() - (-a).exp()) / (a.exp() + (-a).exp()))


def test_rule_3_1_generator__stays_in_range():
    """However large the last weights, [-1, 1], and both ends are reached."""
    generator = Generator(6, 1).double()
    generator.conv.weight.data *= 1e4
    cubes = generator(random(4, LATENT))
    assert (cubes.min().item(), cubes.max().item()) == (-1, 1)


def test_rule_3_1_generator__linear_from_128_to_three_cubed():
    """The first layer takes 128 numbers to 8w channels of 3³, for the thesis' cube at width 16."""
    with torch.device("meta"):
        linear = Generator(48, 16).linear
    assert (linear.in_features, linear.out_features) == (128, 8 * 16 * 27)


def test_rule_3_1_generator__formula():
    """tanh(conv 3³(block(block(linear(z) as 4w×3³)))) for cube 12, w = 1, with nothing between."""
    g, z = shaken(Generator(12, 1)), random(2, LATENT)
    h = (z @ g.linear.weight.T + g.linear.bias).reshape(2, 4, 3, 3, 3)
    assert near(g(z), three(g.blocks[1](g.blocks[0](h)), g.conv).tanh())


@pytest.mark.parametrize("place", [0, 1, 64, 127])
def test_rule_3_1_generator__reads_the_whole_latent(place):
    """Every entry, the one-hot's two among them, reaches the cube."""
    latent = random(1, LATENT).requires_grad_()
    slope, = torch.autograd.grad(Generator(6, 1).double()(latent).square().sum(), latent)
    assert slope[0, place].abs() > 0


def reach_of_others(kind, output):
    """d(output of sample 0)/d(input of every sample) while training: (its own, the others'), at most."""
    x = samples(kind, 6).requires_grad_()
    slope, = torch.autograd.grad(output(build(kind, 6).double().train()(x))[0].square().sum(), x)
    return slope[0].abs().max().item(), slope[1:].abs().max().item()


def test_rule_3_1_generator__no_layer_mixes_samples():
    """A cube depends on its own z alone."""
    own, others = reach_of_others(Generator, lambda cubes: cubes)
    assert own > 0 and others == 0


# The critic

@pytest.mark.parametrize("cube", [12, 24, 48])
def test_rule_3_1_critic__shapes(cube):
    """(n, 1, c, c, c) → score (n,) and logits (n, 2)."""
    score, logits = Critic(cube, 1)(torch.randn(2, 1, cube, cube, cube))
    assert (score.shape, logits.shape) == ((2,), (2, 2))


def convolutions(block):
    """(kernel's side, channels in, channels out) of a block's convolutions: the body's two, the skip's."""
    return [(layer.kernel_size[0], layer.in_channels, layer.out_channels) for layer in block.modules()
            if isinstance(layer, nn.Conv3d)]


def test_rule_3_1_first_block__the_cube_enters_it():
    """The first block's convolutions are 3³ 1 → w, 3³ w → 2w and, on the skip, 1³ 1 → 2w; then w → w → 2w."""
    first, second, _ = critic_blocks([2, 4, 8, 16])
    assert convolutions(first) == [(3, 1, 2), (3, 2, 4), (1, 1, 4)]
    assert convolutions(second) == [(3, 4, 4), (3, 4, 8), (1, 4, 8)]


@pytest.mark.parametrize("cube", [6, 12, 24, 48])
def test_rule_3_1_first_block__one_convolution_at_full_size(cube):
    """Of all the critic's layers only the first convolution, its norm and its activation keep the cube's side."""
    critic = Critic(cube, 1)
    full_size = [row.layer for row in layer_table(critic, torch.zeros(1, 1, cube, cube, cube))
                 if row.shape.endswith(f"{cube}×{cube}×{cube}")]
    assert full_size == ["conv 3³", "layer norm", "leaky ReLU"]


@pytest.mark.parametrize("output", [0, 1])
def test_rule_3_1_critic__no_layer_mixes_samples(output):
    """A sample's score and logits depend on it alone, or the penalty per sample would be wrong."""
    own, others = reach_of_others(Critic, lambda outputs: outputs[output])
    assert own > 0 and others == 0


def test_rule_3_1_critic__a_batch_scores_as_its_samples_do():
    """Scores and logits of a batch are those of its samples one by one."""
    critic, x = Critic(12, 1).double(), samples(Critic, 12)
    together, alone = critic(x), [critic(x[i:i + 1]) for i in range(3)]
    assert all(near(together[k], torch.cat([outputs[k] for outputs in alone])) for k in (0, 1))


@pytest.mark.parametrize("output, head", [(0, "score"), (1, "logits")])
def test_rule_3_1_critic__heads_are_linear(output, head):
    """A head's weights times −1024 make its output times −1024, exactly: no activation, any sign, any size."""
    critic, x = Critic(6, 1).double(), samples(Critic, 6)
    layer, before = getattr(critic, head), critic(x)[output]
    layer.weight.data *= -1024
    layer.bias.data *= -1024
    assert torch.equal(critic(x)[output], -1024 * before) and before.abs().min() > 0


def test_rule_3_1_critic__formula():
    """The heads' trunk is block(block(x)) for cube 12, with nothing before, between or after."""
    c, x = shaken(Critic(12, 1)), samples(Critic, 12)
    trunk = c.trunk[1](c.trunk[0](x)).reshape(3, -1)
    assert near(c(x)[0], trunk @ c.score.weight[0] + c.score.bias, 1e-11)
    assert near(c(x)[1], trunk @ c.logits.weight.T + c.logits.bias, 1e-11)


def test_rule_3_1_critic__outputs_stay_float32_under_autocast():
    """bfloat16 inside, but scores and logits leave as float32; float64 stays float64."""
    critic, x = Critic(6, 1), torch.randn(2, 1, 6, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert {y.dtype for y in critic(x)} == {torch.float32}
    assert {y.dtype for y in critic.double()(x.double())} == {torch.float64}


def test_rule_3_1_critic__heads_share_one_trunk():
    """Each head is W·t + b of the same flattened 8w·3³ numbers."""
    critic, seen = Critic(6, 1).double(), []
    critic.trunk.register_forward_hook(lambda layer, x, trunk: seen.append(trunk))
    (score, logits), (trunk,) = critic(samples(Critic, 6)), seen
    assert trunk.shape == (3, 2 * 27)
    assert near(score, (trunk * critic.score.weight[0]).sum(1) + critic.score.bias)
    assert near(logits, (trunk[:, None] * critic.logits.weight).sum(2) + critic.logits.bias)


@pytest.mark.parametrize("corner", [(0, 0, 0), (11, 0, 5), (6, 11, 11)])
def test_rule_3_1_critic__sees_every_part_of_the_cube(corner):
    """The score has a slope at the cube's corners and faces too."""
    x = samples(Critic, 12, 1).requires_grad_()
    slope, = torch.autograd.grad(Critic(12, 1).double()(x)[0].sum(), x)
    assert slope[0, 0][corner].abs() > 0


# 3.2 Lung nodule detection classifier

@pytest.mark.parametrize("cube, halvings", [(6, 1), (12, 2), (24, 3), (48, 4)])
def test_rule_3_2_classifier__strided_convolution_and_max_pool_in_turn(cube, halvings):
    """Strided convolution and max pool in turn until side 3, an LReLU a convolution; linear, LReLU, linear."""
    body = [layer for layer in kinds(Classifier, cube) if layer != "leaky ReLU"]
    assert body == [*(["conv 3³, stride 2", "max pool 2"] * 2)[:halvings], "flatten", "linear", "linear"]
    assert kinds(Classifier, cube).count("leaky ReLU") == body.count("conv 3³, stride 2") + 1


def test_rule_3_2_classifier__is_the_activation_before_the_pooling():
    """Conv, LReLU, max pool in this order, by hand in float64: the same logits and the same gradients, exactly."""
    classifier, x = Classifier(24).double(), samples(Classifier, 24)
    convolutions = [layer for layer in classifier if isinstance(layer, torch.nn.Conv3d)]
    linears = [layer for layer in classifier if isinstance(layer, torch.nn.Linear)]
    features = torch.nn.functional.leaky_relu(convolutions[0](x), 0.2)
    features = torch.nn.functional.max_pool3d(features, 2)
    features = torch.nn.functional.leaky_relu(convolutions[1](features), 0.2).flatten(1)
    logits = linears[1](torch.nn.functional.leaky_relu(linears[0](features), 0.2))
    assert torch.equal(classifier(x), logits)

    parameters = list(classifier.parameters())
    ours = torch.autograd.grad(classifier(x).square().sum(), parameters)
    by_hand = torch.autograd.grad(logits.square().sum(), parameters)
    assert all(near(*pair) for pair in zip(ours, by_hand))


def test_rule_3_2_classifier__each_halves_every_axis():
    """48: 16 channels of 24³, pooled to 12³; 32 of 6³, pooled to 3³; then 32·27, 64 and 2 numbers."""
    shapes = [shape for _, layer, shape, _ in table(Classifier, 48) if layer != "leaky ReLU"]
    assert shapes == ["16×24×24×24", "16×12×12×12", "32×6×6×6", "32×3×3×3", "864", "64", "2"]


def test_rule_3_2_classifier__kernels_of_three():
    """Parameters for 48: 27·16 + 16, 27·16·32 + 32, 864·64 + 64, 64·2 + 2."""
    counts = [parameters for _, _, _, parameters in table(Classifier, 48) if parameters]
    assert counts == [448, 13856, 55360, 130]


def test_rule_3_2_classifier__formula():
    """For cube 12, from plain parts: a max over 2×2×2 of LReLU(conv 3³ of stride 2), then two linear layers."""
    classifier, x = shaken(Classifier(12)), samples(Classifier, 12)
    first, _, _, _, hidden, _, last = classifier
    h = F.leaky_relu(three(x, first)[..., ::2, ::2, ::2], 0.2)
    h = torch.stack([h[..., i::2, j::2, k::2] for i, j, k in itertools.product((0, 1), repeat=3)]).amax(0).flatten(1)
    h = F.leaky_relu(h @ hidden.weight.T + hidden.bias, 0.2)
    assert near(classifier(x), h @ last.weight.T + last.bias)


def test_rule_3_2_classifier__no_layer_mixes_samples():
    """A sample's logits depend on it alone."""
    own, others = reach_of_others(Classifier, lambda logits: logits)
    assert own > 0 and others == 0


# Figures 4–6, as tables

@pytest.mark.parametrize("kind", [Generator, Critic, Classifier])
@pytest.mark.parametrize("cube", [6, 24])
def test_layer_table__every_parameter_once(kind, cube):
    """The rows' parameters add up to the network's, and no layer with parameters stands twice."""
    rows = table(kind, cube)
    names = [name for name, _, _, parameters in rows if parameters]
    assert sum(row[-1] for row in rows) == sum(p.numel() for p in build(kind, cube).parameters())
    assert len(names) == len(set(names))


def test_layer_table__by_hand():
    """The critic's first convolution, width 2: 2 channels of 6³ from one, 27·2 + 2 numbers; the score's 4·27 + 1."""
    rows = {name: (shape, parameters) for name, _, shape, parameters in table(Critic, 6, 2)}
    assert (rows["trunk.0.body.0"], rows["score"]) == (("2×6×6×6", 56), ("1", 109))


def test_layer_table__knows_every_layer():
    """No layer of any network is shown as PyTorch shows it, with arguments in parentheses."""
    for kind in (Generator, Critic, Classifier):
        assert not [layer for layer in kinds(kind, 24) if "(" in layer]
    assert models.in_words("any", nn.Softplus()).startswith("Softplus(")


def test_layer_table__leaves_no_hook():
    """A later call of the network adds no row."""
    network, x = Critic(6, 1), torch.zeros(1, 1, 6, 6, 6)
    rows = layer_table(network, x)
    count = len(rows)
    network(x)
    assert len(rows) == count


def test_generator__the_first_tanh_of_a_process_is_one_threads():
    """Of two threads that call MKL's tanh for the first time at once, one may get other last bits: in 8 of 45 processes
    the first batch of cubes differed. So the module calls it once, for one number, before any batch."""
    code = ("import torch; sizes = []; tanh = torch.tanh\n"
            "torch.tanh = lambda x: sizes.append(x.numel()) or tanh(x)\n"
            "import models; generator = models.Generator(6, 1)\n"
            "generator(torch.zeros(4, models.LATENT)); print(sizes)")
    here = Path(models.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert done.stdout == f"[1, {4 * 6 ** 3}]\n", done.stderr
