"""Section 1.3, the mathematics behind the thesis: each equation as a function, each claim as a test of it.

    python -m pytest tests/test_background.py -v

"Erratum" marks what holds where the thesis says otherwise. φ is tanh; numbers are float64.
"""

from functools import partial

import numpy as np
import pytest
import torch
from scipy import optimize, spatial, stats
from torch.autograd import grad
from torch.autograd.functional import jacobian
from torch.nn import functional

import losses
import models


tensor = partial(torch.tensor, dtype=torch.float64)


def draw(seed, *shape):
    """Numbers from 𝒩(0, 1), the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found, expected):
    """One shape, and equal values up to rounding; a swapped axis or a broadcast is not the same."""
    found, expected = (torch.as_tensor(a, dtype=torch.float64) for a in (found, expected))
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-7, atol=1e-9)


X, LAYERS = draw(0, 3), [(draw(m, d, m), draw(m, m)) for d, m in ((3, 5), (5, 4), (4, 2))]    # a 3-5-4-2 network
W, B = LAYERS[0]
P, Q = tensor([0.1, 0.2, 0.3, 0.4, 0]), tensor([0.4, 0.3, 0.1, 0, 0.2])    # two laws over five outcomes
REAL, FAKE, EQUAL = draw(1, 6, 2), 2 * draw(2, 6, 2) + 1, tensor([1] * 6) / 6    # points (6, 2), their masses (6,)


# 1.3.1 Neural network basics

def single_layer(x, v, w, b, activation=torch.tanh):
    """F(x) = Σᵢ vᵢ·φ(wᵢᵀx + bᵢ)   [eq_1_3_1_single_layer]; x (n, d), v (N,), w (d, N), b (N,)"""
    return activation(x @ w + b) @ v


def test_eq_1_3_1_single_layer__not_any_function():
    """It meets sin 9x at five points. Erratum: not any f; far out |F| ≤ Σ|vᵢ|, and φ = z² gives parabolas only."""
    x, v, w, b = torch.arange(-2, 3, dtype=torch.float64)[:, None], draw(1, 9), draw(2, 1, 9), draw(3, 9)
    assert single_layer(1e9 * x, v, w, b).abs().max() <= v.abs().sum()
    assert same(single_layer(x, v, w, b, torch.square).diff(n=3), [0, 0])
    best = torch.linalg.lstsq(torch.tanh(x @ w + b), torch.sin(9 * x)).solution[:, 0]
    assert same(single_layer(x, best, w, b), torch.sin(9 * x)[:, 0])


@pytest.mark.parametrize("free", ["v", "w", "b", "vwb"])
def test_eq_1_3_1_argmin__each_of_v_w_b_lowers_the_loss(free):
    """θ := argmin_θ L(y, F_θ(X)): each of 50 steps θ ← θ − η·∂L/∂θ lowers L   [eq_1_3_1_argmin]"""
    x, theta = draw(1, 20, 2), {"v": draw(2, 5), "w": draw(3, 2, 5), "b": draw(4, 5)}
    loss = lambda *moved: (x.prod(1) - single_layer(x, **theta | dict(zip(free, moved)))).square().mean()
    for _ in range(50):
        now = tuple(theta[name] for name in free)
        after = [p - 0.01 * slope for p, slope in zip(now, jacobian(loss, now))]
        assert loss(*after) < loss(*now)
        theta |= zip(free, after)


def layer(x, w, b, activation=torch.tanh):
    """F(X) = φ(wᵀX + b)   [eq_1_3_1_layer]; x (d,), w (d, m), a unit in each column, b (m,) → (m,)"""
    return activation(w.T @ x + b)


def multilayer(x, layers):
    """ŷ = F_N(F_{N−1}(…F₂(F₁(X₀))))   [eq_1_3_1_multilayer]; layers: (w₁, b₁), …, (w_N, b_N)"""
    for w, b in layers:
        x = layer(x, w, b)
    return x


def test_eq_1_3_1_layer__unit_by_unit():
    """Unit i is φ(Σⱼ wⱼᵢ·Xⱼ + bᵢ)."""
    assert same(layer(X, W, B), [torch.tanh(W[:, i] @ X + B[i]) for i in range(5)])


def test_eq_1_3_1_multilayer__last_layer_without_activation():
    """Erratum: the single-layer F is F₂(F₁(x)) without φ in F₂; with it |ŷ| < 1, and most y are out of reach."""
    v, none = tensor([4, -4, 4, 4, 4]), tensor([0])
    target = single_layer(X[None], v, W, B)
    assert same(layer(layer(X, W, B), v[:, None], none, torch.nn.Identity()), target)
    assert same(multilayer(X, [(W, B), (v[:, None], none)]), target.tanh()) and target.abs() > 1


def derivatives(x, w, b):
    """∂F/∂w = φ'(wᵀX + b)·Xᵀ   [eq_1_3_1_backprop_w]; (m, d): row i is for column i of w, so laid out as wᵀ
    ∂F/∂b = φ'(wᵀX + b)·1   [eq_1_3_1_backprop_b]; (m,): bᵢ moves unit i alone
    ∂F/∂X = φ'(wᵀX + b)·wᵀ   [eq_1_3_1_backprop_x]; (m, d): φ', that is 1 − tanh², scales the rows of wᵀ
    """
    slope = 1 - torch.tanh(w.T @ x + b) ** 2
    return slope[:, None] * x, slope, slope[:, None] * w.T


def test_eq_1_3_1_backprop_w__equals_autograd():
    """∂Fᵢ/∂wⱼₖ is φ'·Xᵀ at (i, j) where k = i, and 0 in the other units' columns: (5, 3, 5)."""
    expected = torch.einsum("ij, ik -> ijk", derivatives(X, W, B)[0], torch.eye(5).double())
    assert same(jacobian(lambda w: layer(X, w, B), W), expected)


def test_eq_1_3_1_backprop_b__equals_autograd():
    """∂Fᵢ/∂bₖ is φ' where k = i, else 0."""
    assert same(jacobian(lambda b: layer(X, W, b), B), derivatives(X, W, B)[1].diag())


def test_eq_1_3_1_backprop_x__equals_autograd():
    """∂Fᵢ/∂Xⱼ is φ'·wᵀ at (i, j): (5, 3), so a missing transpose shows."""
    assert same(jacobian(lambda x: layer(x, W, B), X), derivatives(X, W, B)[2])


def backprop(x, layers, given):
    """∂X_k → ∂w_k, ∂b_k, ∂X_{k−1} for k = N, …, 1   [rule_1_3_1_recursion]; given ∂L/∂ŷ; ∂X₀, ∂w₁, ∂b₁, ∂w₂, …"""
    if not layers:
        return [given]
    given, *later = backprop(layer(x, *layers[0]), layers[1:], given)
    by_w, by_b, by_x = derivatives(x, *layers[0])
    return [given @ by_x, (given[:, None] * by_w).T, given * by_b, *later]


def test_rule_1_3_1_recursion__equals_autograd():
    """Layer by layer, the three formulas give every gradient of L = Σ(ŷ − y)², y = 1."""
    found = backprop(X, LAYERS, 2 * (multilayer(X, LAYERS) - 1))
    loss = lambda x, *p: (multilayer(x, zip(p[::2], p[1::2])) - 1).square().sum()
    expected = jacobian(loss, (X, *sum(LAYERS, ())))
    assert len(found) == 7 and all(map(same, found, expected))


def test_rule_1_3_1_vanishing__factors_multiply():
    """Erratum: ∂X₀ = Πₖ φ'·wₖ, multiplied: small factors vanish, large explode   [rule_1_3_1_vanishing]"""
    chain = lambda w: jacobian(lambda x: multilayer(x, [(tensor([[w]]), tensor([0]))] * 20), tensor([0]))
    assert same(chain(0.5) * 2 ** 20, [[1]]) and same(chain(2) / 2 ** 20, [[1]])    # at X = 0 every φ' is 1


# 1.3.2 Residual network

def residual(x, w, b):
    """F(X) + X   [eq_1_3_2_residual]"""
    return layer(x, w, b) + x


def test_eq_1_3_2_residual__starts_as_the_identity():
    """Where F is 0 a layer hands on its input; F is the adjustment, output minus input."""
    w, b = draw(1, 3, 3), draw(2, 3)
    assert same(residual(X, 0 * w, 0 * b), X) and same(residual(X, w, b) - X, layer(X, w, b))


@pytest.mark.parametrize("scale", [1, 0])
def test_eq_1_3_2_derivative__adds_the_identity_matrix(scale):
    """∂(F(X) + X)/∂X = F'(X) + I   [eq_1_3_2_derivative]; erratum: I, not all ones; I alone where F' = 0"""
    w, b, identity = scale * draw(1, 3, 3), draw(2, 3), torch.eye(3).double()
    found = jacobian(lambda x: residual(x, w, b), X)
    assert same(found, derivatives(X, w, b)[2] + identity) and same(found, identity) == (scale == 0)


# 1.3.3 Generative adversarial network: D(x), p = p_data and q, the law of G(z), over k outcomes x, each (k,)

def discriminator_value(d, p, q):
    """𝔼_{x∼p} log D(x) + 𝔼_z log(1 − D(G(z)))   [eq_1_3_3_discriminator]; D maximises it"""
    return torch.xlogy(p, d).sum() + torch.xlogy(q, 1 - d).sum()


def test_eq_1_3_3_discriminator__is_negated_cross_entropy():
    """Minus the sum of two binary cross-entropies: the truth is 1 for reals and 0 for fakes."""
    d, entropy = tensor([0.2, 0.5, 0.7, 0.9, 0.3]), partial(functional.binary_cross_entropy, reduction="sum")
    assert same(discriminator_value(d, P, Q), -entropy(d, 0 * d + 1, weight=P) - entropy(d, 0 * d, weight=Q))


def test_eq_1_3_3_generator__is_not_minimising_js():
    """𝔼_z log D(G(z))   [eq_1_3_3_generator]; erratum: at D* its slope is that of 2·JS − KL(q ‖ p), not of −JS"""
    weights, p = draw(1, 3).requires_grad_(), tensor([0.2, 0.3, 0.5])
    q = weights.softmax(0)
    d, slope = (p / (p + q)).detach(), lambda value: grad(value, weights, retain_graph=True)[0]
    assert same(slope(discriminator_value(d, p, q)), slope(2 * js(p, q)))    # [6]'s proof is of log(1 − D)
    assert same(slope((q * d.log()).sum()), slope(2 * js(p, q) - kl(q, p)))


@pytest.mark.parametrize("p, q", [(P, Q), (P[:4], P[:4]), (tensor([0.3, 0.7, 0]), tensor([0, 0, 1]))])
def test_rule_1_3_3_optimum__value_is_js(p, q):
    """D* = p/(p + q), as a search finds; there the objective is −log 4 + 2·JS(p ‖ q)   [rule_1_3_3_optimum]"""
    search = partial(optimize.minimize_scalar, bounds=(0, 1), method="bounded", options={"xatol": 1e-9})
    found = [search(lambda d: -discriminator_value(tensor(d), *pair).item()).x for pair in zip(p, q)]
    assert np.allclose(found, p / (p + q), atol=1e-6)
    assert same(discriminator_value(p / (p + q), p, q), 2 * js(p, q) - np.log(4))


# 1.3.4 Auxiliary classifier GAN: samples that are their own logits, so a wrong label costs 40 and a right one 0

def test_rule_1_3_4_critic_truth__reals_and_fakes_each_have_theirs():
    """The truth is the real labels for reals, the generator's labels for fakes   [rule_1_3_4_critic_truth]"""
    y_real, y_fake = torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0])
    real, fake = 40 * torch.eye(2)[y_real], 40 * torch.eye(2)[y_fake]
    loss = lambda *y: losses.critic_loss(lambda x: (x[:, 0], x), real, y[0], fake, y[1], P[:3], 10, 1).auxiliary
    assert same([loss(y_real, y_fake), loss(y_fake, y_fake), loss(y_real, y_real)], [0, 40 / 6, 40 / 6])


def test_rule_1_3_4_generator_truth__desired_labels():
    """Erratum: the desired labels; the critic's predictions excuse any class   [rule_1_3_4_generator_truth]"""
    desired, fake = torch.tensor([0, 0, 1]), 40 * torch.eye(2)[[1, 0, 1]]    # the first came out wrong
    loss = lambda truth: losses.generator_loss(lambda x: (x[:, 0], x), fake, truth, 1).auxiliary
    assert same([loss(desired), loss(fake.argmax(1))], [40 / 3, 0])


# 1.3.5 Wasserstein GAN: divergences over outcomes, p and q (k,); distances between points, x (n, d) and y (m, d)

def kl(p, q):
    """KL(P ‖ Q) = Σₓ P(x)·log(P(x)/Q(x))   [eq_1_3_5_kl]; 0 where P(x) = 0, ∞ where Q(x) = 0 < P(x)"""
    p, q = p[p > 0], q[p > 0]
    return (p * (p / q).log()).sum()


def mixture(p, q):
    """M = ½(P + Q)   [eq_1_3_5_mixture]"""
    return (p + q) / 2


def js(p, q):
    """JS(P ‖ Q) = ½·KL(P ‖ M) + ½·KL(Q ‖ M)   [eq_1_3_5_js]"""
    return kl(p, mixture(p, q)) / 2 + kl(q, mixture(p, q)) / 2


def test_eq_1_3_5_kl__scipy_agrees():
    """Also where P is 0; ∞ where Q = 0 < P; 0 for equal distributions and above 0 for a hundred unequal ones."""
    pairs = draw(1, 100, 2, 5).softmax(2)
    assert all(same(kl(p, q), stats.entropy(p, q)) and kl(p, q) > 0 for p, q in pairs)
    assert same(kl(P, pairs[0, 0]), stats.entropy(P, pairs[0, 0])) and kl(P, P) == 0 and kl(P, Q) == np.inf


def test_eq_1_3_5_mixture__covers_both():
    """M is a distribution, and nowhere 0 where P or Q is not: KL(P ‖ M) is finite where KL(P ‖ Q) is not."""
    assert same(mixture(P, Q), [0.25, 0.25, 0.2, 0.2, 0.1]) and kl(P, mixture(P, Q)) < kl(P, Q) == np.inf


def test_eq_1_3_5_js__scipy_agrees():
    """scipy's Jensen-Shannon distance squared; the same from both sides, 0 for equal distributions."""
    assert same(js(P, Q), spatial.distance.jensenshannon(P, Q) ** 2) and js(P, Q) == js(Q, P) and js(P, P) == 0


def test_eq_1_3_5_kl_disjoint__log_2_without_overlap_only():
    """KL(P ‖ M) = log 2 without overlap, where KL(P ‖ Q) = ∞; with overlap it is less   [eq_1_3_5_kl_disjoint]"""
    p, q = torch.cat([P, 0 * Q]), torch.cat([0 * P, Q])
    assert same([kl(p, mixture(p, q)), kl(q, mixture(p, q))], [np.log(2)] * 2)
    assert kl(p, q) == np.inf and kl(P, mixture(P, Q)) < np.log(2)


def test_eq_1_3_5_js_disjoint__stands_still():
    """JS(P ‖ Q) = log 2 without overlap, so its gradient is 0; with overlap, neither   [eq_1_3_5_js_disjoint]"""
    histogram = lambda points: (1 - (torch.arange(40) - points[:, None]).abs()).relu().mean(0)    # of linear bins
    for shift, disjoint in ((10, True), (30, True), (0.3, False)):
        real, fake = tensor([3.2, 4.6]), tensor([3.2 + shift, 4.6 + shift]).requires_grad_()
        value = js(histogram(real), histogram(fake))
        assert same(value, np.log(2)) == same(grad(value, fake)[0], [0, 0]) == disjoint


def wasserstein(x, y, mu, nu, power=1):
    """W(μ, ν) = inf_{γ ∈ Π(μ, ν)} 𝔼_{(x,y)∼γ} ‖x − y‖₂   [eq_1_3_5_wasserstein]; masses mu (n,), nu (m,)"""
    cost, rows, columns = torch.cdist(x, y).flatten() ** power, np.eye(len(x)), np.eye(len(y))
    marginals = np.vstack([np.kron(rows, np.ones(len(y))), np.kron(np.ones(len(x)), columns)])
    return cost @ tensor(optimize.linprog(cost.detach().numpy(), A_eq=marginals, b_eq=np.r_[mu, nu]).x)


def lipschitz(points, values):
    """f(x) = maxᵢ (fᵢ − ‖x − xᵢ‖₂), so |f(a) − f(b)| ≤ ‖a − b‖₂ and ‖∇f‖₂ ≤ 1   [rule_1_3_5_lipschitz]"""
    return lambda x: (values - torch.cdist(x, points)).amax(1)


def test_eq_1_3_5_wasserstein__closed_forms():
    """In 1-D scipy's; from a pile to itself moved by (3, 4), 5; between equal masses, the best assignment."""
    mu, nu, cost = draw(3, 6).softmax(0), draw(4, 4).softmax(0), torch.cdist(REAL, FAKE).numpy()
    x, y = REAL[:, 0], FAKE[:4, 0]
    assert same(wasserstein(x[:, None], y[:, None], mu, nu), stats.wasserstein_distance(x, y, mu, nu))
    assert same(wasserstein(REAL, REAL + tensor([3, 4]), mu, mu), 5)
    assert same(wasserstein(REAL, FAKE, EQUAL, EQUAL), cost[optimize.linear_sum_assignment(cost)].mean())


def test_eq_1_3_5_dual__is_reached_and_never_passed():
    """sup = inf: the estimate is W at the best f, less at 100 others of ‖f‖_L ≤ 1, and more at 2f, too steep."""
    points, each, distance = torch.cat([REAL, FAKE]), np.eye(12), wasserstein(REAL, FAKE, EQUAL, EQUAL)
    slopes = (each[:, None] - each).reshape(-1, 12), torch.cdist(points, points).flatten().numpy()    # all pairs'
    best = lipschitz(points, tensor(optimize.linprog([-1 / 6] * 6 + [1 / 6] * 6, *slopes, bounds=(None, None)).x))
    estimate = lambda f: losses.wasserstein_estimate(f(REAL), f(FAKE))
    assert same(estimate(best), distance) and estimate(lambda x: 2 * best(x)) > distance
    assert all(estimate(lipschitz(points, draw(seed, 12))) < distance for seed in range(100))


def test_rule_1_3_5_lipschitz__bounds_the_gradient_where_there_is_one():
    """Erratum: ‖∇f‖₂ ≤ 1 almost everywhere; f(x) = −|x| is 1-Lipschitz, and has slopes 1 and −1 at 0."""
    f, peak = lipschitz(FAKE, draw(5, 6)), lipschitz(tensor([[0]]), tensor([0]))
    assert (torch.pdist(f(REAL)[:, None]) <= torch.pdist(REAL)).all()
    assert same(jacobian(lambda x: f(x).sum(), REAL).norm(dim=1), [1] * 6)
    assert same(peak(tensor([[-0.1], [0], [0.1]])).diff(), [0.1, -0.1])


def test_rule_1_3_5_gradient__almost_everywhere():
    """∂W/∂y leads from a fake's real, however far; erratum: no gradient where they meet   [rule_1_3_5_gradient]"""
    far = lambda y: wasserstein(REAL, y, EQUAL, EQUAL)
    slope = jacobian(far, FAKE + 100)
    assert same(slope.norm(dim=1), EQUAL) and same(far(FAKE + 100 - 7 * slope / EQUAL[0]), far(FAKE + 100) - 7)
    near = lambda theta: wasserstein(tensor([[0]]), tensor([[theta]]), [1], [1])
    assert same([near(-0.1), near(0), near(0.1)], [0.1, 0, 0.1])    # |θ|, a kink at 0


def test_rule_1_3_5_moment__one_is_the_power_of_the_distance():
    """Erratum: W₁ is inf 𝔼‖x − y‖¹, not of first moments: means of 0 both, yet W₁ = 2   [rule_1_3_5_moment]"""
    x, y = tensor([[-3], [-1], [1], [3]]), tensor([[0]])
    assert x.mean() == y.mean() and same([wasserstein(x, y, [0.25] * 4, [1], power) for power in (1, 2)], [2, 5])


def test_rule_1_3_5_critic_unbounded__no_sigmoid():
    """f(x) ∈ ℝ, no sigmoid: with its bias raised by 1000 it rises by 1000   [rule_1_3_5_critic_unbounded]"""
    critic, x = models.Critic(24, 2).double().requires_grad_(False), draw(1, 2, 1, 24, 24, 24)
    before, _ = critic(x)
    critic.score.bias += 1000
    assert same(critic(x)[0], before + 1000)


def test_rule_1_3_5_critic_unbounded__a_sigmoid_diminishes_the_gradient():
    """σ' ≤ ¼, and 0 far out. Erratum: log σ, 1.3.3's loss of G, is steep where fakes fail; log(1 − σ) is flat."""
    slope = lambda f: jacobian(lambda s: f(s).sum(), tensor([-30, 0, 30]))
    assert same(slope(torch.sigmoid), [0, 0.25, 0])
    assert same(slope(lambda s: functional.logsigmoid(-s)), [0, -0.5, -1])    # log(1 − σ(s))
    assert same(slope(functional.logsigmoid), [1, 0.5, 0])
