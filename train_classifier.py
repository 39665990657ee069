"""Augmentation and classifier training: sections 4.2, 4.3 and 4.4.

    python train_classifier.py --run runs/demo       # after train_gan.py

The GAN generates cubes, its critic scores them, the best are selected (4.3); then three classifiers are trained
(4.4, 5.2): on real data with conventional augmentation, on real and generated data mixed, on generated data alone.
Leaves <run>/classifiers: generated/positive.npy and negative.npy; samples.png; checkpoint.pt and log.jsonl of real,
mixed and fake.
"""

import zlib

import numpy as np
import torch

import lungaug
import preprocessing
from losses import classifier_loss
from lungaug import check
from models import LATENT, Classifier, Critic, Generator, conditional_latent

ARMS = ("real", "mixed", "fake")
BETAS = (0.9, 0.999)    # 4.4.1   [num_4_4_adam]
SPARE = 16              # rejected samples kept for the pictures


# 4.2 Conventional augmentation: the eight flips of each positive; no noise, which would blur the Hounsfield scale

def conventional_positives(dataset, split):
    """Every positive of a split with each of its eight flips   [rule_4_2_flips]: rows (8n, 4), flips (8n,)"""
    return preprocessing.with_flips(dataset.positives[split])


def no_flips(rows):
    """The rows (n, 4) as they are, with the flip that is none: rows, flips (n,)"""
    return rows, np.zeros(len(rows), int)


# 4.3 Generative augmentation: generate, score, select

def select(scores, probabilities, score_threshold, class_probability):
    """f(x) ≥ threshold and ŷ(class) ≥ p: real enough, and surely of its class   [rule_4_3_select]

    scores f(x), probabilities ŷ of the wanted class: (n,). Returns bool (n,). A critic loss below some threshold, as
    the thesis says it, is a score above one: the loss is −f(x).
    """
    return (scores >= score_threshold) & (probabilities >= class_probability)


def score_reals(critic, dataset, label, device, most=2048):
    """Critic scores of the training reals of one class, evenly chosen where there are more than `most`: (n,)"""
    rows, flips = conventional_positives(dataset, "train") if label == 1 else no_flips(dataset.negatives["train"])
    chosen = np.unique(np.linspace(0, len(rows) - 1, most).astype(int))
    return lungaug.predict(lambda x: critic(x)[0], lambda part: preprocessing.read_cubes(
        dataset, rows[chosen[part]], flips[chosen[part]]), len(chosen), device)


@torch.no_grad()
def generate(generator, critic, label, wanted, threshold, arguments, device):
    """Generate cubes of a class, score them, keep those that pass, until `wanted`   [rule_4_3_generate_score_select]

    Returns cubes, int16 HU (n, c, c, c), n < wanted where --attempts runs out; the best-scored of the rejected, for the
    pictures of a GAN that delivers none; and the acceptance rate.
    """
    noise = lungaug.torch_stream(arguments.seed, "generate", label)
    kept, spare, attempts = [], [], 0
    step = lungaug.progress(f"generated {'negatives' if label == 0 else 'positives'}", wanted)
    while sum(map(len, kept)) < wanted and attempts < wanted * arguments.attempts:
        labels = torch.full((min(64, wanted * arguments.attempts - attempts),), label)
        latent = conditional_latent(torch.randn(len(labels), LATENT, generator=noise), labels)
        cubes = generator(latent.to(device))
        scores, logits = critic(cubes)
        chosen = select(scores, logits.softmax(1)[:, label], threshold, arguments.class_probability).cpu()
        cubes = np.rint(preprocessing.denormalize(cubes[:, 0].cpu().numpy())).astype(np.int16)
        kept.append(cubes[chosen.numpy()])
        attempts += len(labels)
        step(min(wanted, sum(map(len, kept))), f"{attempts} attempts")
        spare += [(float(score), cube) for score, cube, taken in zip(scores, cubes, chosen) if not taken]
        spare = sorted(spare, key=lambda pair: -pair[0])[:SPARE]
    kept = np.concatenate(kept)
    rejected = np.array([cube for _, cube in spare], np.int16).reshape(-1, *kept.shape[1:])
    return kept[:wanted], rejected, len(kept) / attempts


def load_gan(run, dataset, device):
    """Generator and critic from <run>/gan/checkpoint.pt, trained on this dataset. Raises Refusal."""
    path = run / "gan" / "checkpoint.pt"
    state = lungaug.load_checkpoint(path, f"run python train_gan.py --run {run} first", prepared=dataset.fingerprint)
    with lungaug.refusing(path, "train the GAN again with --overwrite"):
        networks = [build(state["settings"]["cube"], state["settings"]["width"]) for build in (Generator, Critic)]
        for network, name in zip(networks, ("generator", "critic")):
            network.load_state_dict(state[name])
    return [network.eval().requires_grad_(False).to(device) for network in networks]


def generate_classes(run, dataset, arguments, device):
    """Generate each class as often as there are real positives counted with flips, once a run.

    Returns {"positive": {"wanted", "accepted", "rate", "score_threshold"}, "negative": …}.
    """
    folder, wanted = run / "classifiers" / "generated", 8 * len(dataset.positives["train"])
    path = folder / "generated.json"
    asked = {key: getattr(arguments, key) for key in ("seed", "score_quantile", "class_probability", "attempts")}
    gan = lungaug.read(run / "gan" / "checkpoint.pt", f"run python train_gan.py --run {run} first")
    asked |= {"prepared": dataset.fingerprint, "gan_crc32": zlib.crc32(gan)}
    if path.exists():
        do = f"give the same options, or python train_classifier.py --run {run} --overwrite: it keeps the GAN"
        with lungaug.refusing(path, do):
            found = lungaug.read(path, do)
            lungaug.same_settings(path, found["settings"], asked, do)
            if all((folder / name).exists() and zlib.crc32(lungaug.read(folder / name, "")) == crc
                   for name, crc in found["files"].items()):
                return found["classes"]
    path.unlink(missing_ok=True)        # so that a kill leaves no old record beside new cubes
    generator, critic = load_gan(run, dataset, device)
    classes, files = {}, {}
    for label, name in ((1, "positive"), (0, "negative")):
        threshold = float(np.quantile(score_reals(critic, dataset, label, device), arguments.score_quantile))
        cubes, spare, rate = generate(generator, critic, label, wanted, threshold, arguments, device)
        for kind, array in ((f"{name}.npy", cubes), (f"{name}_rejected.npy", spare)):
            lungaug.write(folder / kind, array)
            files[kind] = zlib.crc32(lungaug.read(folder / kind, ""))
        classes[name] = {"wanted": wanted, "accepted": len(cubes), "rate": rate, "score_threshold": threshold}
        print(f"Generated {name}s: {len(cubes)} of {wanted} wanted, acceptance rate {rate:.1%} "
              f"(score ≥ {threshold:.2f}, class probability ≥ {arguments.class_probability}).", flush=True)
        if len(cubes) < wanted:
            print(f"  The GAN does not deliver within --attempts {arguments.attempts} for each one wanted. Train it "
                  f"longer, or lower --score-quantile (now {arguments.score_quantile}) or --class-probability.",
                  flush=True)
    lungaug.write(path, {"settings": asked, "classes": classes, "files": files})
    return classes


def draw_samples(folder, dataset, count=16):
    """samples.png: middle axial slices, a row each: real and generated positives, real and generated negatives.

    Where fewer were accepted, the best-scored of the rejected follow, and then black.
    """
    middles = []
    for name, rows in (("positive", dataset.positives["train"]), ("negative", dataset.negatives["train"])):
        real = preprocessing.read_cubes(dataset, rows[np.linspace(0, len(rows) - 1, count).astype(int)])[:, 0]
        files = (folder / "generated" / f"{name}{kind}.npy" for kind in ("", "_rejected"))
        made = np.concatenate([preprocessing.open_array(file, dataset.cube)[:count] for file in files])
        made = preprocessing.normalize(made[:count])
        made = np.concatenate([made, -np.ones((count - len(made), *made.shape[1:]), np.float32)])
        middles += [real[:, dataset.cube // 2], made[:, dataset.cube // 2]]
    sheet = lungaug.tile(lungaug.grey(np.concatenate(middles)), count)
    lungaug.write(folder / "samples.png", lungaug.png(sheet, 48 // dataset.cube or 1))


# 4.4, 5.2 Lung nodule detection classifier: its three data sets

class Pool:
    """Cubes of one class to train on: real ones (rows and flips of a dataset), then generated ones (int16 HU)."""

    def __init__(self, dataset, rows, flips, generated):
        self.dataset, self.rows, self.flips, self.generated = dataset, rows, flips, generated

    def __len__(self):
        return len(self.rows) + len(self.generated)

    def read(self, chosen):
        """Cubes (n, 1, c, c, c) in [-1, 1] at the numbers `chosen` (n,), each below len(self); real ones first."""
        real = chosen[chosen < len(self.rows)]
        made = self.generated[chosen[chosen >= len(self.rows)] - len(self.rows)]
        return np.concatenate([preprocessing.read_cubes(self.dataset, self.rows[real], self.flips[real]),
                               preprocessing.normalize(made)[:, None]])


def arm_pools(arm, run, dataset):
    """Real; real and generated positives, real negatives; generated alone   [rule_5_2_arms]: positives and negatives"""
    positives, negatives = conventional_positives(dataset, "train"), no_flips(dataset.negatives["train"])
    none, no_cubes = no_flips(positives[0][:0]), np.zeros((0, *[dataset.cube] * 3), np.int16)

    def generated(name):
        return preprocessing.open_array(run / "classifiers" / "generated" / f"{name}.npy", dataset.cube)

    if arm == "real":
        return Pool(dataset, *positives, no_cubes), Pool(dataset, *negatives, no_cubes)
    if arm == "mixed":
        return Pool(dataset, *positives, generated("positive")), Pool(dataset, *negatives, no_cubes)
    return Pool(dataset, *none, generated("positive")), Pool(dataset, *none, generated("negative"))


# 4.4.1 Training

def learning_rate(epoch, early, late, decay):
    """10⁻³, and 10⁻⁴ from epoch 30 on   [rule_4_4_decay]; epoch counts from 0"""
    return early if epoch < decay else late


def balanced_batches(positives, negatives, size, rng):
    """Numbers of an epoch's batches, half positive, half negative   [rule_4_4_balanced]

    An epoch passes over the positives once, in a new order; as many negatives are drawn from all of them.
    """
    order = rng.permutation(positives)
    for i in range(0, positives, size // 2):
        part = order[i:i + size // 2]
        yield part, rng.integers(negatives, size=len(part))


def f1_score(labels, predictions):
    """F1 = 2·TP/(2·TP + FP + FN); labels, predictions (n,) of 0 and 1; 0 where the ratio is 0/0"""
    hits = (labels * predictions).sum()
    return float(2 * hits / max(1, labels.sum() + predictions.sum()))


def validate(classifier, dataset, device):
    """F1 and cross-entropy on the validation set, positives with their flips.

    The loss is the mean of the two classes' means, to compare with that of the balanced training batches.
    """
    rows, flips, labels = preprocessing.labelled(dataset, "validation")
    logits = torch.from_numpy(lungaug.predict(
        classifier, lambda part: preprocessing.read_cubes(dataset, rows[part], flips[part]), len(rows), device))
    truth = torch.from_numpy(labels)
    losses = [classifier_loss(logits[truth == y], truth[truth == y]).item() for y in (0, 1) if (labels == y).any()]
    return f1_score(labels, logits.argmax(1).numpy()), float(np.mean(losses))


def settings(arguments):
    """What a checkpoint must agree on with the command that resumes it."""
    names = ("seed", "batch_size", "learning_rate", "late_learning_rate", "decay_epoch")
    return {name: getattr(arguments, name) for name in names}


def train_arm(arm, run, dataset, arguments, delivered, device):
    """Train one classifier and keep the epoch of the best validation F1, ties by the lower loss   [rule_5_2_best_kept]

    Every epoch is a checkpoint, so that a stopped run goes on and ends with the same bytes.
    """
    a, folder, path = arguments, run / "classifiers" / arm, run / "classifiers" / arm / "checkpoint.pt"
    positives, negatives = arm_pools(arm, run, dataset)
    if arm != "real" and not len(positives.generated) or not len(negatives):
        print(f"{arm}: no generated {'negatives' if len(positives.generated) else 'positives'} to train on; left out.")
        for old in (path, folder / "log.jsonl"):    # an older GAN's classifier is not this one's
            old.unlink(missing_ok=True)
        return
    torch.manual_seed(int(lungaug.stream(a.seed, "classifier weights").integers(2 ** 62)))      # the arms start alike
    classifier, draws = Classifier(dataset.cube).to(device), lungaug.stream(a.seed, "classifier batches", arm)
    optimizer = torch.optim.Adam(classifier.parameters(), a.learning_rate, BETAS)
    epoch, best = 0, {"f1": -1.0, "loss": float("inf"), "epoch": -1, "classifier": None}
    asked = settings(a) | {"delivered": delivered, "prepared": dataset.fingerprint}
    if path.exists():
        state = lungaug.load_checkpoint(path, "", **asked)
        with lungaug.refusing(path, "start again with --overwrite"):
            epoch, best = state["epoch"], best | state["best"]      # our own keys: pickle tells copies of a word apart
            classifier.load_state_dict(state["classifier"])
            optimizer.load_state_dict(state["optimizer"])
            draws.bit_generator.state = state["draws"]
    lungaug.rewind_log(folder / "log.jsonl", epoch)
    step = lungaug.progress(f"{arm} epochs", a.epochs)
    while epoch < a.epochs:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, a.learning_rate, a.late_learning_rate, a.decay_epoch)
        losses = []
        for some, others in balanced_batches(len(positives), len(negatives), a.batch_size, draws):
            cubes = torch.from_numpy(np.concatenate([positives.read(some), negatives.read(others)])).to(device)
            labels = torch.from_numpy(np.repeat([1, 0], [len(some), len(others)])).to(device)
            loss = classifier_loss(classifier(cubes), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        epoch += 1
        f1, loss = validate(classifier, dataset, device)
        check(np.isfinite(loss), path, f"a loss that is no number in epoch {epoch}",
              "start again with a lower --learning-rate and --overwrite")
        if (f1, -loss) > (best["f1"], -best["loss"]):
            weights = {name: tensor.cpu().clone() for name, tensor in classifier.state_dict().items()}
            best = {"f1": f1, "loss": loss, "epoch": epoch, "classifier": weights}
        lungaug.append_log(folder / "log.jsonl", {"epoch": epoch, "train_loss": float(np.mean(losses)),
                                                  "validation_loss": loss, "validation_f1": f1})
        lungaug.write(path, {
            "settings": asked, "epochs": a.epochs, "epoch": epoch, "best": best, "classifier": classifier.state_dict(),
            "optimizer": optimizer.state_dict(), "draws": draws.bit_generator.state})
        step(epoch, f"loss {np.mean(losses):.3f}, validation F1 {f1:.3f}")
    print(f"{arm}: {len(positives)} positives, {len(negatives)} negatives; "
          f"best validation F1 {best['f1']:.3f}, at epoch {best['epoch']}.", flush=True)


def main():
    arguments = lungaug.parse(__doc__.split("\n")[0], "train_classifier")
    run = arguments.run
    dataset = preprocessing.open_dataset(run)
    lungaug.settle(arguments, "train_classifier", dataset.info["preset"])
    device = lungaug.pick_device(arguments.device)
    print(f"Preset {arguments.preset}, cube {dataset.cube}, on {device}.", flush=True)
    with lungaug.alone(run / "classifiers", "training"):
        if arguments.overwrite:
            load_gan(run, dataset, device)      # or a Refusal, before anything is lost
            lungaug.discard(run / "classifiers", "*/checkpoint.pt", "*/log.jsonl", "*/generated.json", "options.json")
        generated = generate_classes(run, dataset, arguments, device)
        draw_samples(run / "classifiers", dataset)
        for arm in ARMS:
            train_arm(arm, run, dataset, arguments, generated if arm != "real" else None, device)
    rows = [(name, *map(lungaug.shown, (row["wanted"], row["accepted"], row["rate"], row["score_threshold"])))
            for name, row in generated.items()]
    head = ("class", "wanted", "accepted", "acceptance rate", "score at least")
    lungaug.record_stage(run / "classifiers", arguments, [
        "4.3 Generative augmentation",
        ("Samples wanted, and those that passed the selection.", head, rows),
        ("Middle axial slices, a row each: real, generated positives; real, generated negatives. Rejected ones follow "
         "where fewer were accepted.", "samples.png")])


if __name__ == "__main__":
    lungaug.command(main)
