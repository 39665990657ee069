"""Sections 1.3.5 and 3.3: every loss against critics with closed forms, values worked by hand, and finite differences.

    python -m pytest tests/test_losses.py -v

Cubes are (n, 1, z, y, x) with unequal sides, so that a swapped axis shows; all of it in float64.
"""

import math

import pytest
import torch
from scipy import stats

from losses import (
    auxiliary_cross_entropy,
    classifier_loss,
    critic_loss,
    generator_loss,
    gradient_penalty,
    interpolate,
    wasserstein_estimate,
)
from models import LATENT, Critic, Generator, conditional_latent


SHAPE = (3, 1, 2, 3, 4)
LN3 = math.log(3)       # softmax(0, ln 3) = (1/4, 3/4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def cubes(*voxels):
    """Samples given by their voxels, as (n, 1, 1, 1, voxels)."""
    return numbers(*voxels).reshape(len(voxels), 1, 1, 1, -1)


def linear(w):
    """f(x) = w·x, so ∇f = w everywhere; logits (0, the sum of the voxels)."""
    return lambda x: (x.flatten(1) @ w.flatten(), torch.stack([0 * x.flatten(1).sum(1), x.flatten(1).sum(1)], 1))


def quadratic(x, a=1.0):
    """f(x) = a/2·‖x‖², so ∇f(x̂) = a·x̂; logits (0, the sum of the voxels)."""
    return a / 2 * x.flatten(1).square().sum(1), linear(torch.ones_like(x[0]))(x)[1]


def says(*logits):
    """A critic of score f(x) = the first voxel that says these logits of its samples, whatever they are."""
    return lambda x: (x.flatten(1)[:, 0], numbers(*logits)[:len(x)] + 0 * x.flatten(1)[:, :1])


# 1.3.5 Wasserstein GAN with gradient penalty

def test_eq_1_3_5_dual__by_hand():
    """𝔼_real − 𝔼_fake: (1 + 2 + 6)/3 − (0 + 1)/2 = 2.5, whatever the counts."""
    assert wasserstein_estimate(numbers(1, 2, 6), numbers(0, 1)).item() == 2.5


def test_eq_1_3_5_dual__is_the_distance_at_the_best_critic():
    """On a line, all reals above all fakes, f(x) = x is the best 1-Lipschitz f: W₁ by sorted transport agrees."""
    real, fake = random(50).abs(), -random(50).abs()
    assert wasserstein_estimate(real, fake).item() == pytest.approx(stats.wasserstein_distance(real, fake), abs=1e-14)


def test_eq_1_3_5_dual__never_above_the_distance():
    """sup over ‖f‖_L ≤ 1: f = sin is 1-Lipschitz, so its estimate stays below W₁."""
    real, fake = 3 * random(50), 3 * random(50) + 1
    assert abs(wasserstein_estimate(real.sin(), fake.sin())) <= stats.wasserstein_distance(real, fake)


def test_eq_1_3_5_interpolate__by_hand(compared):
    """ε = 1/4 between a real 4 and a fake 8 is 7; ε = 1 the real, ε = 0 the fake."""
    x_hat = interpolate(cubes([4], [4], [4]), cubes([8], [8], [8]), numbers(0.25, 1, 0))
    compared("x̂", x_hat, [7.0, 4.0, 8.0])
    assert x_hat.flatten().tolist() == [7, 4, 8]


def test_eq_1_3_5_interpolate__one_epsilon_for_all_voxels_of_a_sample():
    """(x̂ − x_fake)/(x_real − x_fake) is εᵢ at every voxel of sample i, another for each sample."""
    real, fake, epsilon = random(*SHAPE), random(*SHAPE), numbers(0.125, 0.5, 0.75)
    share = (interpolate(real, fake, epsilon) - fake) / (real - fake)
    assert torch.allclose(share, epsilon[:, None, None, None, None].expand(SHAPE), rtol=0, atol=1e-11)


def test_eq_1_3_5_interpolate__lies_on_the_segment():
    """‖x̂ − x_real‖ + ‖x̂ − x_fake‖ = ‖x_real − x_fake‖ for each sample."""
    real, fake = random(*SHAPE), random(*SHAPE)
    x_hat = interpolate(real, fake, torch.rand(3, dtype=torch.float64))
    ways = [(a - b).flatten(1).norm(dim=1) for a, b in ((x_hat, real), (x_hat, fake), (real, fake))]
    assert torch.allclose(ways[0] + ways[1], ways[2], rtol=1e-14)


def test_eq_1_3_5_gradient_penalty__linear_critic():
    """f = w·x: the penalty is (‖w‖ − 1)² for every sample, whatever real, fake and ε."""
    w = random(*SHAPE[1:])
    penalty = gradient_penalty(linear(w), random(*SHAPE), random(*SHAPE), torch.rand(3, dtype=torch.float64))
    assert torch.allclose(penalty, ((w.square().sum().sqrt() - 1) ** 2).expand(3), rtol=1e-13)


def test_eq_1_3_5_gradient_penalty__half_square_critic_by_hand(compared):
    """f = ½‖x‖², real (3, 0), fake (0, 4): ε = 0, ½, 1 give ‖x̂‖ = 4, 2.5, 3 and so 9, 2.25, 4."""
    real, fake = cubes([3, 0], [3, 0], [3, 0]), cubes([0, 4], [0, 4], [0, 4])
    penalty = gradient_penalty(quadratic, real, fake, numbers(0, 0.5, 1))
    compared("penalty", penalty.detach(), [9.0, 2.25, 4.0])
    assert penalty.tolist() == [9, 2.25, 4]


def test_eq_1_3_5_gradient_penalty__half_square_critic():
    """f = ½‖x‖²: ∇f(x̂) = x̂, so the penalty is (‖x̂‖ − 1)², the norm over all voxels of one sample."""
    real, fake, epsilon = random(*SHAPE), random(*SHAPE), numbers(0.125, 0.5, 0.75)
    norms = [math.sqrt(sum(v * v for v in (e * r + (1 - e) * f).flatten().tolist()))
             for e, r, f in zip(epsilon.tolist(), real, fake)]
    penalties = gradient_penalty(quadratic, real, fake, epsilon).tolist()
    assert penalties == pytest.approx([(n - 1) ** 2 for n in norms], rel=1e-13)


def test_eq_1_3_5_gradient_penalty__flat_critic():
    """f = 0·x: the penalty is 1 and its derivative is 0, not NaN."""
    w = torch.zeros(SHAPE[1:], dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(linear(w), random(*SHAPE), random(*SHAPE), numbers(0, 0.5, 1))
    penalty.sum().backward()
    assert penalty.tolist() == [1, 1, 1] and (w.grad == 0).all()


def test_eq_1_3_5_gradient_penalty__one_flat_sample_spoils_no_other(compared):
    """f = a/2·‖x‖² at x̂ = 0 beside x̂ = (3, 4), a = 2: penalties 1 and 81; d/da = 2·(a·5 − 1)·5 = 90, finite."""
    a, x = numbers(2).requires_grad_(), cubes([0, 0], [3, 4])
    penalty = gradient_penalty(lambda x: quadratic(x, a), x, x, numbers(0.5, 0.5))
    penalty.sum().backward()
    compared("penalty's slope", a.grad, 90.0)
    assert penalty.tolist() == [1, 81] and a.grad.item() == 90


def test_eq_1_3_5_gradient_penalty__gradient_in_linear_weights_by_hand():
    """f = w·x, w = (3, 4): (5 − 1)² = 16, and its derivative is 2·(5 − 1)·w/5 = (4.8, 6.4)."""
    w = numbers(3, 4).requires_grad_()
    penalty = gradient_penalty(linear(w), cubes([1, 0]), cubes([0, 2]), numbers(0.3))
    penalty.sum().backward()
    assert penalty.item() == 16 and w.grad.tolist() == pytest.approx([4.8, 6.4], rel=1e-15)


def test_eq_1_3_5_gradient_penalty__gradient_in_a_quadratic_weight_by_hand():
    """f = a/2·‖x‖², a = 2, x̂ = (1.5, 2): (2·2.5 − 1)² = 16, and d/da = 2·(5 − 1)·2.5 = 20."""
    a = numbers(2).requires_grad_()
    penalty = gradient_penalty(lambda x: quadratic(x, a), cubes([3, 0]), cubes([0, 4]), numbers(0.5))
    penalty.sum().backward()
    assert penalty.item() == 16 and a.grad.item() == 20


def test_eq_1_3_5_gradient_penalty__two_sided():
    """A gradient below 1 is penalised too: ‖w‖ = ½ gives ¼, not 0."""
    penalty = gradient_penalty(linear(numbers(0.3, 0.4)), cubes([1, 0]), cubes([0, 2]), numbers(0.5))
    assert penalty.item() == pytest.approx(0.25)


def test_eq_1_3_5_gradient_penalty__one_number_a_sample():
    """(n,), and sample i's penalty is what it is alone."""
    critic, epsilon = Critic(6, 1).double(), numbers(0.1, 0.5, 0.9)
    real, fake = random(3, 1, 6, 6, 6), random(3, 1, 6, 6, 6)
    together = gradient_penalty(critic, real, fake, epsilon)
    alone = [gradient_penalty(critic, real[i:i + 1], fake[i:i + 1], epsilon[i:i + 1]).item() for i in range(3)]
    assert together.shape == (3,) and together.tolist() == pytest.approx(alone, rel=1e-10)


def test_eq_1_3_5_gradient_penalty__is_of_the_score_alone():
    """Logits with any gradient of their own change nothing: ∇ is of f, not of ŷ."""
    steep = lambda x: (quadratic(x)[0], 100 * x.flatten(1)[:, :2])
    real, fake, epsilon = random(*SHAPE), random(*SHAPE), numbers(0.1, 0.5, 0.9)
    assert torch.equal(gradient_penalty(steep, real, fake, epsilon), gradient_penalty(quadratic, real, fake, epsilon))


def test_eq_1_3_5_gradient_penalty__no_gradient_to_the_samples():
    """It is a loss of the critic's weights: none of it reaches what made the real, the fake or ε."""
    a, real, fake, epsilon = (t.requires_grad_() for t in (numbers(2), random(*SHAPE), random(*SHAPE), random(3)))
    gradient_penalty(lambda x: quadratic(x, a), real, fake, epsilon).sum().backward()
    assert real.grad is None and fake.grad is None and epsilon.grad is None and a.grad.abs() > 0


def test_eq_1_3_5_gradient_penalty__norm_of_a_network_by_finite_differences():
    """‖∇f(x̂)‖ of a real critic from central differences in each of its 216 voxels."""
    critic, real, fake, epsilon = Critic(6, 1).double(), random(1, 1, 6, 6, 6), random(1, 1, 6, 6, 6), numbers(0.3)
    steps = 1e-5 * torch.eye(216, dtype=torch.float64).reshape(216, 1, 6, 6, 6)
    x_hat = 0.3 * real + 0.7 * fake
    with torch.no_grad():
        slopes = (critic(x_hat + steps)[0] - critic(x_hat - steps)[0]) / 2e-5
    expected = (math.sqrt(sum(s * s for s in slopes.tolist())) - 1) ** 2
    assert gradient_penalty(critic, real, fake, epsilon).item() == pytest.approx(expected, rel=1e-7)


# 3.3.1 Critic loss

def test_eq_3_3_1_auxiliary__by_hand(compared):
    """softmax(0, ln 3) = (¼, ¾): −log ¾ where the label is 1, −log ¼ where it is 0; the mean of both is ½·log 16/3."""
    logits = numbers([0, LN3], [0, LN3])
    one = auxiliary_cross_entropy(logits[:1], torch.tensor([1])).item()
    both = auxiliary_cross_entropy(logits, torch.tensor([1, 0])).item()
    compared("cross-entropy", both, math.log(16 / 3) / 2)
    assert one == pytest.approx(math.log(4 / 3), abs=1e-15)
    assert both == pytest.approx(math.log(16 / 3) / 2, abs=1e-15)


def test_eq_3_3_1_auxiliary__gradient_by_hand():
    """d/dlogits = (ŷ − y)/n: (¼ − 1, ¾)/2 for label 0, (¼, ¾ − 1)/2 for label 1."""
    logits = numbers([0, LN3], [0, LN3]).requires_grad_()
    auxiliary_cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert logits.grad.flatten().tolist() == pytest.approx([-0.375, 0.375, 0.125, -0.125], abs=1e-15)


def test_eq_3_3_1_auxiliary__takes_logits_of_any_size():
    """Logits (0, 1000): 1000 for label 0 and 0 for label 1, neither infinite."""
    logits = numbers([0, 1000])
    assert [auxiliary_cross_entropy(logits, torch.tensor([y])).item() for y in (0, 1)] == [1000, 0]


def test_eq_3_3_1_auxiliary__same_for_shifted_logits():
    """The softmax does not change where a constant is added to both logits."""
    logits, labels = random(5, 2), torch.tensor([0, 1, 1, 0, 1])
    shifted = auxiliary_cross_entropy(logits + random(5, 1), labels)
    assert shifted.item() == pytest.approx(auxiliary_cross_entropy(logits, labels).item(), abs=1e-14)


def critic_terms(critic, real, fake, penalty_scale=0.0, auxiliary_scale=0.0, real_labels=None, fake_labels=None):
    """critic_loss with ε = ½ and, where none are given, label 1 for reals and 0 for fakes."""
    n = len(real)
    return critic_loss(critic, real, torch.ones(n, dtype=torch.int64) if real_labels is None else real_labels, fake,
                       torch.zeros(n, dtype=torch.int64) if fake_labels is None else fake_labels,
                       torch.full((n,), 0.5, dtype=torch.float64), penalty_scale, auxiliary_scale)


def test_eq_3_3_1_critic_loss__by_hand(compared):
    """f = w·x, w = (3, 4), real (1, 0), fake (0, 2), λ = 10, α = 2: 8 − 3 + 10·16 + 2·½(log(1+1/e) + log(1+e²))."""
    terms = critic_terms(linear(numbers(3, 4)), cubes([1, 0]), cubes([0, 2]), 10, 2)
    cross_entropy = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    compared("critic loss", terms.total.detach(), 165 + 2 * cross_entropy)
    assert terms.total.item() == pytest.approx(165 + 2 * cross_entropy, rel=1e-15)


def test_eq_3_3_1_critic_loss__sign():
    """λ = α = 0: L_f = f(fake) − f(real), and −L_f is the field `wasserstein`, mean f(real) − mean f(fake)."""
    terms = critic_terms(says([0, 0]), cubes([1], [4]), cubes([0], [-3]))
    assert (terms.total.item(), terms.wasserstein.item()) == (-4, 4)


def test_eq_3_3_1_critic_loss__step_raises_reals_above_fakes():
    """λ = α = 0, f = w·x: dL_f/dw = mean x_fake − mean x_real, unbounded by any hinge."""
    w, real, fake = (100 * random(24)).requires_grad_(), random(*SHAPE), random(*SHAPE)
    critic_terms(linear(w), real, fake).total.backward()
    assert torch.allclose(w.grad, (fake.flatten(1).mean(0) - real.flatten(1).mean(0)), rtol=1e-13, atol=1e-15)


def test_eq_3_3_1_critic_loss__terms_are_unscaled():
    """λ and α change the total alone: its terms are those under λ = α = 1, and it is −W + λP + αA of them."""
    real, fake = random(*SHAPE), random(*SHAPE)
    plain, scaled = (critic_terms(quadratic, real, fake, *scales) for scales in ((1, 1), (7, 3)))
    assert plain[1:] == scaled[1:]
    total = -plain.wasserstein + 7 * plain.penalty + 3 * plain.auxiliary
    assert scaled.total.item() == pytest.approx(total.item(), rel=1e-14)


@pytest.mark.parametrize("scale", [0.0, 10.0])
def test_eq_3_3_1_critic_loss__penalty_is_the_mean_of_the_samples(scale):
    """f = ½‖x‖², x̂ = 3 and 5: the mean of (3 − 1)² and (5 − 1)² is 10, under any λ."""
    assert critic_terms(quadratic, cubes([4], [8]), cubes([2], [2]), scale).penalty.item() == 10


def test_eq_3_3_1_critic_loss__epsilon_is_the_share_of_the_real():
    """f = ½‖x‖², real 5, fake 2, ε = 1: the penalty is the real's, 16, not the fake's, 1."""
    one, label = numbers(1), torch.tensor([1])
    assert critic_loss(quadratic, cubes([5]), label, cubes([2]), label, one, 1, 0).penalty.item() == 16


def test_eq_3_3_1_critic_loss__no_gradient_to_what_made_the_fakes():
    """L_f's gradient stops at the fakes and reaches the critic's weights."""
    source, w = random(*SHAPE).requires_grad_(), random(24).requires_grad_()
    critic_terms(linear(w), random(*SHAPE), source.tanh(), 10, 1).total.backward()
    assert source.grad is None and w.grad.abs().min() > 0


def test_eq_3_3_1_critic_loss__accuracies():
    """Reals and fakes apart: says class 1 throughout, so labels (1, 0) give ½ and (0, 0) give 0."""
    terms = critic_terms(says([0, 1]), cubes([0], [0]), cubes([0], [0]), 0, 1, torch.tensor([1, 0]),
                         torch.tensor([0, 0]))
    assert (terms.real_accuracy.item(), terms.fake_accuracy.item()) == (0.5, 0)


def slopes(loss, parameters, step=1e-6):
    """For each parameter tensor: d loss along a random direction, by central differences and by the gradients."""
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients):
        way = torch.randn_like(parameter)
        ends = []
        for move in (step, -2 * step):
            parameter.data += move * way
            ends.append(loss().item())
        parameter.data += step * way
        yield (ends[0] - ends[1]) / (2 * step), (gradient * way).sum().item()


def test_eq_3_3_1_critic_loss__gradient_by_finite_differences():
    """The whole L_f of a small critic, along each of its weight tensors; λ = 10, α = 2."""
    critic, epsilon = Critic(6, 1).double(), numbers(0.1, 0.5, 0.8)
    real, fake = random(3, 1, 6, 6, 6), random(3, 1, 6, 6, 6)
    labels = torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1])
    loss = lambda: critic_loss(critic, real, labels[0], fake, labels[1], epsilon, 10, 2).total
    for measured, derived in slopes(loss, list(critic.parameters())):
        assert derived == pytest.approx(measured, rel=1e-6, abs=1e-7)


def test_rule_3_3_1_concatenation__by_hand():
    """Real says (¼, ¾) with label 1, fake (½, ½) with label 0: the mean over both is ½(log 4/3 + log 2)."""
    terms = critic_terms(says([0, LN3], [0, 0]), cubes([0]), cubes([0]), 0, 1)
    assert terms.auxiliary.item() == pytest.approx(math.log(8 / 3) / 2, abs=1e-15)


def test_rule_3_3_1_concatenation__labels_stay_with_their_samples():
    """Real (¼, ¾) with label 0, fake (½, ½) with label 1: ½(log 4 + log 2)."""
    terms = critic_terms(says([0, LN3], [0, 0]), cubes([0]), cubes([0]), 0, 1, torch.tensor([0]), torch.tensor([1]))
    assert terms.auxiliary.item() == pytest.approx(math.log(8) / 2, abs=1e-15)


def test_rule_3_3_1_concatenation__mean_over_all_2n():
    """The cross-entropy is the mean over reals and fakes of −log ŷ_y; that of the reals alone is another."""
    real, fake = random(*SHAPE), random(*SHAPE)
    one = [math.log1p(math.exp(-x.sum())) for x in real] + [math.log1p(math.exp(x.sum())) for x in fake]
    auxiliary = critic_terms(quadratic, real, fake, 0, 1).auxiliary.item()
    assert auxiliary == pytest.approx(sum(one) / 6, rel=1e-13) and abs(auxiliary - sum(one[:3]) / 3) > 0.1


# 3.3.2 Generator loss

def test_eq_3_3_2_generator_loss__by_hand(compared):
    """Scores 1 and 4, both (¼, ¾), labels 1 and 0, α = 2: −2.5 + 2·½(log 4/3 + log 4)."""
    terms = generator_loss(says([0, LN3], [0, LN3]), cubes([1], [4]), torch.tensor([1, 0]), 2)
    compared("generator loss", terms.total.detach(), -2.5 + math.log(16 / 3))
    assert terms.total.item() == pytest.approx(-2.5 + math.log(16 / 3), rel=1e-15)


def test_eq_3_3_2_generator_loss__terms_are_unscaled():
    """`score` is mean f(fake), `auxiliary` the cross-entropy, whatever α."""
    terms = generator_loss(says([0, 0], [0, 0]), cubes([1], [4]), torch.tensor([1, 0]), 10)
    assert terms.score.item() == 2.5 and terms.auxiliary.item() == pytest.approx(math.log(2), rel=1e-15)


def test_eq_3_3_2_generator_loss__step_raises_the_score():
    """α = 0, f = w·x: dL_G/dx_fake = −w/n, so a step down L_G raises f(fake)."""
    fake, w = random(*SHAPE).requires_grad_(), random(24)
    generator_loss(linear(w), fake, torch.tensor([0, 1, 0]), 0).total.backward()
    assert torch.allclose(fake.grad.flatten(1), (-w / 3).expand(3, -1), rtol=1e-14)


@pytest.mark.parametrize("label, expected", [(1, 4 / 3), (0, 4)])
def test_eq_3_3_2_generator_loss__target_is_the_desired_label(label, expected):
    """The critic says (¼, ¾): the truth is the label asked for, not the critic's prediction."""
    terms = generator_loss(says([0, LN3]), cubes([1]), torch.tensor([label]), 1)
    assert terms.auxiliary.item() == pytest.approx(math.log(expected), abs=1e-15)


def test_eq_3_3_2_generator_loss__gradient_by_finite_differences():
    """The whole L_G of a small generator under a small critic, along each of the generator's weight tensors; α = 2."""
    generator, critic, labels = Generator(6, 1).double(), Critic(6, 1).double(), torch.tensor([1, 0, 1])
    latent = conditional_latent(random(3, LATENT), labels)
    for measured, derived in slopes(lambda: generator_loss(critic, generator(latent), labels, 2).total,
                                    list(generator.parameters())):
        assert derived == pytest.approx(measured, rel=1e-6, abs=1e-7)


# 3.3.3 Lung nodule detection classifier loss

def test_eq_3_3_3_classifier_loss__by_hand():
    """(¼, ¾) with label 0 and (½, ½) with label 1: ½(log 4 + log 2)."""
    loss = classifier_loss(numbers([0, LN3], [7, 7]), torch.tensor([0, 1])).item()
    assert loss == pytest.approx(math.log(8) / 2, rel=1e-15)


def test_eq_3_3_3_classifier_loss__log_odds():
    """Of two classes it is log(1 + e^−m), m the right logit less the wrong one, meant over the batch."""
    logits, labels = random(5, 2), torch.tensor([0, 1, 1, 0, 1])
    margins = [(row[y] - row[1 - y]).item() for row, y in zip(logits, labels)]
    mean = sum(math.log1p(math.exp(-m)) for m in margins) / 5
    assert classifier_loss(logits, labels).item() == pytest.approx(mean, rel=1e-14)
