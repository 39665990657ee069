"""Mistakes that people publish, each as a change to this program, with the id of the check that must catch it.

    python tests/wrong_versions.py                       # put each in place in turn; its guard must fail
    python tests/wrong_versions.py --only sigmoid_score
    python lungaug.py audit --wrong sigmoid_score        # every check that catches it: a lecture's demonstration

Most were found in well-known repositories. Exit status 1 where a guard passes.
"""

import argparse
import difflib
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import audit


class Wrong(NamedTuple):
    """What the mistake is, the id that guards against it, the file, and its text before and after."""
    says: str
    guard: str
    file: str
    changes: tuple      # of (before, after); each `before` stands once in the file


WRONG = {
    # 1.3.5 and 3.3: the losses
    "one_epsilon_a_batch": Wrong(
        "one ε for the whole batch", "eq_1_3_5_interpolate", "losses.py",
        (("epsilon = epsilon.reshape(-1, *[1] * (real.dim() - 1))", "epsilon = epsilon[0]"),)),
    "one_epsilon_a_voxel": Wrong(
        "ε drawn for each voxel", "eq_1_3_5_interpolate", "losses.py",
        (("epsilon = epsilon.reshape(-1, *[1] * (real.dim() - 1))", "epsilon = torch.rand_like(real)"),)),
    "epsilon_is_one": Wrong(
        "ε = 1: the penalty sees reals alone", "eq_1_3_5_interpolate", "losses.py",
        (("return epsilon * real + (1 - epsilon) * fake", "return real + 0 * epsilon * fake"),)),
    "norm_over_channels": Wrong(
        "the norm over the channel axis alone, each voxel's slope driven to 1", "eq_1_3_5_gradient_penalty",
        "losses.py",
        (("vector_norm(gradient.flatten(1), dim=1)", "vector_norm(gradient, dim=1)"),)),
    "norm_of_the_batch": Wrong(
        "the norm of the batch's gradient, not of each sample's", "eq_1_3_5_gradient_penalty", "losses.py",
        (("vector_norm(gradient.flatten(1), dim=1)", "vector_norm(gradient).expand(len(gradient))"),)),
    "penalty_without_graph": Wrong(
        "the penalty without create_graph: no gradient reaches the weights", "eq_1_3_5_gradient_penalty", "losses.py",
        (("create_graph=True)", "retain_graph=True)"),)),
    "bare_square_root": Wrong(
        "a bare square root: NaN where the gradient is 0", "eq_1_3_5_gradient_penalty", "losses.py",
        (("torch.linalg.vector_norm(gradient.flatten(1), dim=1)", "gradient.flatten(1).pow(2).sum(1).sqrt()"),)),
    "critic_signs_swapped": Wrong(
        "the critic's signs swapped: reals scored low", "eq_3_3_1_critic_loss", "losses.py",
        (("total = -wasserstein +", "total = wasserstein +"),)),
    "generator_sign_swapped": Wrong(
        "the generator's sign swapped: it makes what the critic calls fake", "eq_3_3_2_generator_loss", "losses.py",
        (("GeneratorLoss(-score +", "GeneratorLoss(score +"),)),
    "hinge_loss": Wrong(
        "a hinge under the name Wasserstein", "eq_3_3_1_critic_loss", "losses.py",
        (("total = -wasserstein +", "total = (1 - score[:n]).relu().mean() + (1 + score[n:]).relu().mean() +"),)),
    "penalty_stepped_apart": Wrong(
        "the penalty left out of the loss, for an optimizer step of its own", "eq_3_3_1_critic_loss", "losses.py",
        (("-wasserstein + penalty_scale * penalty +", "-wasserstein +"),)),
    "fakes_not_detached": Wrong(
        "the critic's loss reaches the generator", "eq_3_3_1_critic_loss", "losses.py",
        (("    fake = fake.detach()\n", ""),)),
    "auxiliary_on_reals_only": Wrong(
        "the auxiliary loss on reals alone", "rule_3_3_1_concatenation", "losses.py",
        (("auxiliary = auxiliary_cross_entropy(logits, labels)\n    total",
          "auxiliary = auxiliary_cross_entropy(logits[:n], real_labels)\n    total"),)),
    "own_prediction_as_truth": Wrong(
        "the generator's cross-entropy against the critic's own prediction, as 1.3.4 has it", "eq_3_3_2_generator_loss",
        "losses.py",
        (("score.mean(), auxiliary_cross_entropy(logits, labels)",
          "score.mean(), auxiliary_cross_entropy(logits, logits.argmax(1))"),)),
    "softmax_twice": Wrong(
        "a softmax before a cross-entropy that takes logits", "eq_3_3_1_auxiliary", "losses.py",
        (("torch.log_softmax(logits, dim=1)", "torch.log_softmax(logits.softmax(1), dim=1)"),)),
    # 3.1: the networks
    "sigmoid_score": Wrong(
        "a sigmoid on the critic's score", "rule_3_1_critic", "models.py",
        (("self.score(trunk)[:, 0])", "self.score(trunk)[:, 0].sigmoid())"),)),
    "batch_norm": Wrong(
        "batch norm in the critic: one sample's score depends on another", "rule_3_1_layer_norm", "models.py",
        (("return nn.GroupNorm(1, channels) ", "return nn.BatchNorm3d(channels) "),)),
    "one_hot_reversed": Wrong(
        "the one-hot reversed", "rule_3_1_one_hot", "models.py",
        (("F.one_hot(labels, CLASSES)", "F.one_hot(1 - labels, CLASSES)"),)),
    # 4.1: the training
    "epsilon_normal": Wrong(
        "ε normal in place of uniform", "rule_3_3_1_epsilon", "train_gan.py",
        (("return torch.rand(count, generator=noise)", "return torch.randn(count, generator=noise)"),)),
    "two_latents": Wrong(
        "training noise uniform, sampling noise normal", "rule_3_3_1_latent", "train_gan.py",
        (("torch.randn(len(labels), LATENT", "torch.rand(len(labels), LATENT"),)),
    "one_to_five": Wrong(
        "one critic step to five of the generator", "rule_4_1_five_to_one", "train_gan.py",
        (("    for _ in range(a.critic_iterations):\n", "    for _ in range(1):\n"),
         ("    generator = generator_iteration(",
          "    for _ in range(4):\n        generator_iteration(trainer, a.batch_size, scale)\n"
          "    generator = generator_iteration("))),
    "short_batches_skipped": Wrong(
        "some of the five critic steps skipped", "rule_4_1_five_to_one", "train_gan.py",
        (("    for _ in range(a.critic_iterations):\n", "    for _ in range(a.critic_iterations - 1):\n"),)),
    "reals_used_five_times": Wrong(
        "the same reals at each of the five critic steps", "rule_4_1_five_to_one", "train_gan.py",
        (("    for _ in range(a.critic_iterations):\n"
          "        batch = draw_batch(dataset, a.batch_size, trainer.draws)\n",
          "    batch = draw_batch(dataset, a.batch_size, trainer.draws)\n"
          "    for _ in range(a.critic_iterations):\n"),)),
    "critics_last_z": Wrong(
        "the generator given the critic's last z", "rule_4_1_five_to_one", "train_gan.py",
        (("    generator = generator_iteration(",
          "    trainer.noise.set_state(before)\n    generator = generator_iteration("),
         ("        rounds.append(", "        before = trainer.noise.get_state()\n        rounds.append("))),
    # 2: the data
    "direction_ignored": Wrong(
        "the direction matrix ignored", "rule_2_1_1_resample", "preprocessing.py",
        (("    return scan.direction * scan.spacing", "    return np.eye(3) * scan.spacing"),)),
    "direction_transposed": Wrong(
        "the direction matrix from the wrong side: turned the wrong way", "rule_2_1_1_resample", "preprocessing.py",
        (("    return scan.direction * scan.spacing", "    return scan.direction.T * scan.spacing"),)),
    "any_flip_is_both": Wrong(
        "any flipped axis taken for x and y flipped", "rule_2_1_1_resample", "preprocessing.py",
        (("back = np.diag(axes) < 0", "back = np.array([True, True, False]) & (np.diag(axes) < 0).any()"),)),
    "mirror_off_by_one": Wrong(
        "a mirrored index of n − i for n − 1 − i", "rule_2_1_1_resample", "preprocessing.py",
        (("np.where(back, np.array(hu.shape[::-1]) - 1, 0)", "np.where(back, np.array(hu.shape[::-1]), 0)"),)),
    "rounded_zoom": Wrong(
        "a zoom by a rounded factor, which moves nodules", "rule_2_1_1_resample", "preprocessing.py",
        (("    scan = reorient(scan)\n    origin, shape",
          "    scan = reorient(scan)\n    size = np.array(scan.hu.shape[::-1])\n"
          "    scan = scan._replace(spacing=np.round(size * scan.spacing) / size)\n    origin, shape"),)),
    "slices_sorted_by_z": Wrong(
        "slices sorted by z alone", "rule_2_dicom_geometry", "preprocessing.py",
        (("key=lambda one: one[0] @ normal)", "key=lambda one: one[0][2])"),)),
    "thickness_for_spacing": Wrong(
        "SliceThickness taken for the spacing", "rule_2_dicom_geometry", "preprocessing.py",
        (("between = round(float(np.linalg.norm(step)), 6)",
          "between = float(pydicom.dcmread(paths[0]).SliceThickness)"),)),
    "localizer_left_in": Wrong(
        "a localizer under the series' own UID left in", "rule_2_dicom_geometry", "preprocessing.py",
        (("groups[tuple(np.hstack(plane).round(3))]", "groups[tuple(range(10))]"),)),
    "no_rescale": Wrong(
        "stored values taken for HU", "rule_2_rescale", "preprocessing.py",
        (("float(tags.RescaleSlope) * tags.pixel_array + float(tags.RescaleIntercept)", "1.0 * tags.pixel_array"),)),
    "room_air_as_lung": Wrong(
        "the largest air is the lung: the room", "rule_2_1_3_lungs", "preprocessing.py",
        (("    sizes[0] = sizes[room] = 0", "    sizes[0] = 0"),)),
    "axes_transposed": Wrong(
        "millimetres (x, y, z) taken for an index (z, y, x)", "rule_2_1_4_centre", "preprocessing.py",
        (("(np.asarray(centre, float) - origin)[..., ::-1]", "(np.asarray(centre, float) - origin)"),)),
    "crop_shifted": Wrong(
        "a crop at the border shifted in place of padded: the nodule off its centre", "rule_2_1_4_padding",
        "preprocessing.py",
        (("    start = np.asarray(voxel) - side // 2\n",
          "    start = np.clip(np.asarray(voxel) - side // 2, 0, np.maximum(np.array(hu.shape) - side, 0))\n"),)),
    "split_by_scan": Wrong(
        "scans split in place of patients: two scans of one patient in training and in test", "rule_2_1_5_split",
        "preprocessing.py",
        (('split_patients([record["patient"] for', 'split_patients([record["seriesuid"] for'),
         ('splits[record["patient"]]', 'splits[record["seriesuid"]]'))),
}


def put(name, root):
    """Put the mistake in place in the tree `root`; returns what it is and the change, as text."""
    wrong = WRONG[name]
    path = Path(root) / wrong.file
    before = after = path.read_text()
    for old, new in wrong.changes:
        if after.count(old) != 1:
            raise ValueError(f"{name}: {old!r} stands {after.count(old)} times in {wrong.file}")
        after = after.replace(old, new)
    path.write_text(after)
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), wrong.file, wrong.file, n=0, lineterm="")
    return "\n".join([f"{name}: {wrong.says}", *lines])


def caught(name):
    """Whether the guard of a mistake fails with it in place, and how many tests the guard has."""
    with tempfile.TemporaryDirectory() as folder:
        root = audit.copy_tree(folder)
        put(name, root)
        results = audit.verdicts(root, WRONG[name].guard).get(WRONG[name].guard, {})
        return not all(results.values()), len(results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=sorted(WRONG), metavar="NAME", help="one mistake")
    arguments = parser.parse_args()
    names, missed = [arguments.only] if arguments.only else list(WRONG), 0
    with ThreadPoolExecutor(2) as pool:
        for name, (failed, count) in zip(names, pool.map(caught, names)):
            missed += not failed
            print(f"{'caught' if failed else 'MISSED':<8}{name:<26}{WRONG[name].guard} ({count} tests)", flush=True)
    print(f"{len(names) - missed} of {len(names)} mistakes caught by their guards.")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
