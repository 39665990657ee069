"""Losses: sections 1.3.5 and 3.3, the losses with which the networks are trained.

A critic is any callable `critic(x) -> (score (n,), logits (n, 2))`. Cubes are (n, 1, z, y, x) in
[-1, 1]; labels are (n,) integers, 1 = positive (a nodule), 0 = negative. Every term is a mean over
the batch.
"""

from typing import NamedTuple

import torch


# 1.3.5 Wasserstein GAN with gradient penalty

def wasserstein_estimate(real_scores, fake_scores):
    """W = sup 𝔼_real[f(x)] − 𝔼_fake[f(x)] over ‖f‖_L ≤ 1, here at the present f   [eq_1_3_5_dual]

    real_scores, fake_scores: (n,). Returns a scalar; at the best 1-Lipschitz f it is the distance
    itself.
    """
    return real_scores.mean() - fake_scores.mean()


def interpolate(real, fake, epsilon):
    """x̂ = ε·x_real + (1 − ε)·x_fake   [eq_1_3_5_interpolate]

    real, fake: (n, …); epsilon: (n,), one draw of U[0, 1] per sample, the same for all its voxels.
    """
    # Give ε an axis of length 1 for each axis of a sample, so that it multiplies sample by sample.
    ones = [1] * (real.dim() - 1)
    epsilon = epsilon.reshape(-1, *ones)

    return epsilon * real + (1 - epsilon) * fake


def gradient_penalty(critic, real, fake, epsilon):
    """(‖∇_x̂ f(x̂)‖₂ − 1)², x̂ = ε·x_real + (1 − ε)·x_fake   [eq_1_3_5_gradient_penalty]

    The penalty without its weight λ. real, fake: (n, 1, z, y, x) in [-1, 1]; epsilon: (n,), one
    draw per sample. Returns (n,), one penalty per sample, differentiable in the critic's weights.
    The norm runs over all voxels of one sample; where the gradient is zero the penalty is 1 and its
    derivative is taken as 0, not NaN.
    """
    x_hat = interpolate(real, fake, epsilon).detach().requires_grad_()
    score, _ = critic(x_hat)

    # The score of a sample depends on that sample alone, so the gradient of the sum holds each
    # sample's own gradient. create_graph lets the penalty be differentiated in the weights.
    gradient, = torch.autograd.grad(score.sum(), x_hat, create_graph=True)

    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return (norm - 1) ** 2


# 3.3.1 Critic loss

class CriticLoss(NamedTuple):
    """Scalars, means over the batch: L_f, its terms without their weights, and two accuracies.

    The accuracies do not enter L_f. They are of the class head, not of the score: the share of the
    reals, and of the fakes, whose class it tells right.
    """
    total: torch.Tensor             # L_f
    wasserstein: torch.Tensor       # f(real) − f(fake); it enters L_f negated
    penalty: torch.Tensor
    auxiliary: torch.Tensor         # the cross-entropy, of reals and fakes together
    real_accuracy: torch.Tensor
    fake_accuracy: torch.Tensor


def auxiliary_cross_entropy(logits, labels):
    """−Σᵢ yᵢ·log ŷᵢ, ŷ = softmax(logits), y one-hot   [eq_3_3_1_auxiliary]

    logits: (n, 2), before the softmax; labels: (n,). Returns the mean over the batch.
    """
    log_probability = torch.log_softmax(logits, dim=1)
    return -log_probability.gather(1, labels[:, None]).mean()


def accuracy(logits, labels):
    """Share of samples whose largest logit is their label's; logits (n, 2), labels (n,)."""
    return (logits.argmax(1) == labels).to(logits.dtype).mean()


def critic_loss(critic, real, real_labels, fake, fake_labels, epsilon, penalty_scale,
                auxiliary_scale):
    """L_f = f(X_fake) − f(X_real) + λ(‖∇_x̂ f(x̂)‖₂ − 1)² − α·Σᵢ yᵢ·log ŷᵢ   [eq_3_3_1_critic_loss]

    The cross-entropy is over X = X_real ∩ X_fake: ∩ is concatenation   [rule_3_3_1_concatenation].
    real, fake: (n, 1, z, y, x) in [-1, 1]; *_labels: (n,); epsilon: (n,) from U[0, 1];
    penalty_scale λ, auxiliary_scale α: numbers. No gradient reaches whatever made `fake`.
    Returns CriticLoss: `total` is L_f; `wasserstein`, an estimate of the distance, enters it
    negated; the accuracies do not enter it.
    """
    # Score reals and fakes in one pass, reals first.
    fake = fake.detach()
    score, logits = critic(torch.cat([real, fake]))
    labels = torch.cat([real_labels, fake_labels])
    n = len(real)

    # Compute the three terms.
    wasserstein = wasserstein_estimate(score[:n], score[n:])
    penalty = gradient_penalty(critic, real, fake, epsilon).mean()
    auxiliary = auxiliary_cross_entropy(logits, labels)

    # L_f is minimized, so the distance, which the critic is to make large, enters with a minus.
    total = -wasserstein + penalty_scale * penalty + auxiliary_scale * auxiliary
    return CriticLoss(
        total=total,
        wasserstein=wasserstein,
        penalty=penalty,
        auxiliary=auxiliary,
        real_accuracy=accuracy(logits[:n], real_labels),
        fake_accuracy=accuracy(logits[n:], fake_labels),
    )


# 3.3.2 Generator loss

class GeneratorLoss(NamedTuple):
    """Scalars, means over the batch: L_G, and its terms without their weights."""
    total: torch.Tensor         # L_G
    score: torch.Tensor         # f(X_fake); it enters L_G negated
    auxiliary: torch.Tensor     # the cross-entropy


def generator_loss(critic, fake, labels, auxiliary_scale):
    """L_G = −f(X_fake) − α·Σᵢ yᵢ·log ŷᵢ, y the desired labels   [eq_3_3_2_generator_loss]

    fake: (n, 1, z, y, x), made by the generator from `labels` (n,); auxiliary_scale α: a number.
    Returns GeneratorLoss: `total` is L_G; `score`, the mean f(X_fake), enters it negated.
    """
    score, logits = critic(fake)
    mean_score = score.mean()
    auxiliary = auxiliary_cross_entropy(logits, labels)

    total = -mean_score + auxiliary_scale * auxiliary
    return GeneratorLoss(total, mean_score, auxiliary)


# 3.3.3 Lung nodule detection classifier loss

def classifier_loss(logits, labels):
    """−Σᵢ yᵢ·log ŷᵢ over the two classes, ŷ = softmax(logits)   [eq_3_3_3_classifier_loss]

    logits: (n, 2); labels: (n,). Returns the mean over the batch.
    """
    return auxiliary_cross_entropy(logits, labels)
