"""Make the demo's data and train its models: digits of scikit-learn, enlarged, shifted, cluttered and noised.

Needs the `train` extra (PyTorch, scikit-learn); nothing else in the repository does. One thread and fixed seeds
make a run repeatable. Weights are written with `onnx.helper`, batch normalisation already folded into the
convolutions, so that the files quantise and prune well.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from torch import nn

from demo import models

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Floats = NDArray[np.float32]

SEED = 20240
SIDE = models.IMAGE_SIDE
HELDOUT_ORIGINALS, COPIES_PER_HELDOUT_ORIGINAL, CALIBRATION_ORIGINALS = 600, 3, 256
BATCH = 64
WIDENING_NOISE = 0.05  # in standard deviations of a layer's weights
PARITY_IMAGES, RIDGE, LOGIT_SCALE = 40_960, 20.0, 2.0
POOL = 0  # in a list of channels: halve the resolution here


@dataclass(frozen=True)
class Recipe:
    """One CNN: 3x3 convolutions with these channels, trained on `images` fresh images.

    With `widen_to`, the trained network is then widened to those channels without changing its function
    (Net2WiderNet, Chen, Goodfellow and Shlens, ICLR 2016) and trained on for `widened_images`: most of the
    learning happens where an image is cheap.
    """

    name: str
    channels: tuple[int, ...]
    images: int
    widen_to: tuple[int, ...] = ()
    widened_images: int = 0


RECIPES = (
    Recipe("digits-small", (16, POOL, 16, POOL, 32, POOL), 24_000),
    Recipe(
        "digits-medium",
        (48, 48, 48, 48, POOL, 32, POOL, 32, POOL),
        16_000,
        widen_to=(104, 104, 104, 104, POOL, 48, POOL, 48, POOL),
        widened_images=1_600,
    ),
    Recipe(
        "digits-large",
        (64, 64, 64, 64, 64, 64, 64, 64, 64, POOL, 48, POOL, 48, POOL),
        24_000,
        widen_to=(112, 112, 112, 112, 112, 112, 112, 112, 112, POOL, 48, POOL, 48, POOL),
        widened_images=1_600,
    ),
)


@dataclass(frozen=True)
class Originals:
    """Digits of scikit-learn: images float32 [n,8,8] in 0..1, labels int64 [n]."""

    images: Floats
    labels: Labels

    def take(self, indices: NDArray[np.int64]) -> Originals:
        return Originals(self.images[indices], self.labels[indices])


def split_originals() -> tuple[Originals, Originals, Originals]:
    """Training, calibration and held-out originals; no original is in two of them."""
    digits = load_digits()
    everything = Originals((digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64))
    order = np.random.default_rng(SEED).permutation(len(everything.labels))
    heldout, rest = order[:HELDOUT_ORIGINALS], order[HELDOUT_ORIGINALS:]
    calibration, training = rest[:CALIBRATION_ORIGINALS], rest[CALIBRATION_ORIGINALS:]
    return everything.take(training), everything.take(calibration), everything.take(heldout)


def place(images: Floats, shift: Floats, rng: np.random.Generator) -> Floats:
    """Draw [n,8,8] images enlarged, rotated, sheared and moved by `shift` pixels [n,2] on [n,32,32] canvases."""
    n = len(images)
    angle = rng.uniform(-0.35, 0.35, n)
    enlarge = rng.uniform(2.0, 3.0, n)
    shear = rng.uniform(-0.2, 0.2, n)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] - (SIDE - 1) / 2
    y = rows[None] - shift[:, 0, None, None]
    x = columns[None] - shift[:, 1, None, None]
    cos, sin = (f(angle)[:, None, None] / enlarge[:, None, None] for f in (np.cos, np.sin))
    source_y = cos * y - sin * x + 3.5
    source_x = sin * y + cos * x + shear[:, None, None] * (source_y - 3.5) + 3.5
    return bilinear(images, source_y, source_x)


def bilinear(images: Floats, y: NDArray[np.float64], x: NDArray[np.float64]) -> Floats:
    """Sample [n,8,8] images at [n,32,32] coordinates; outside is empty."""
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))
    y, x = np.clip(y + 1, 0, 9), np.clip(x + 1, 0, 9)
    top, left = y.astype(np.int64), x.astype(np.int64)
    dy, dx = y - top, x - left
    image = np.arange(len(images))[:, None, None]
    upper = padded[image, top, left] * (1 - dx) + padded[image, top, left + 1] * dx
    lower = padded[image, top + 1, left] * (1 - dx) + padded[image, top + 1, left + 1] * dx
    return np.asarray(upper * (1 - dy) + lower * dy, dtype=np.float32)


def degrade(targets: Floats, clutter: Floats, rng: np.random.Generator) -> Images:
    """Hard pictures uint8 [n,1,32,32]: each target near the centre, two neighbours cut off at the edge, an uneven
    background, random contrast, noise. `clutter` are originals [m,8,8] to draw neighbours from."""
    n = len(targets)
    ink = place(targets, rng.uniform(-4, 4, (n, 2)).astype(np.float32), rng)
    for _ in range(2):
        direction = rng.uniform(0, 2 * math.pi, n)
        distance = rng.uniform(18, 23, n)
        shift = np.stack([distance * np.sin(direction), distance * np.cos(direction)], axis=1)
        neighbour = clutter[rng.integers(0, len(clutter), n)]
        ink = np.maximum(ink, place(neighbour, shift.astype(np.float32), rng))
    ramp = np.linspace(-1, 1, SIDE)
    slope = rng.uniform(-0.25, 0.25, (n, 2, 1, 1))
    background = slope[:, 0] * ramp[:, None] + slope[:, 1] * ramp[None, :]
    contrast = rng.uniform(0.4, 0.8, (n, 1, 1))
    noise = rng.normal(0, 1, ink.shape) * rng.uniform(0.03, 0.18, (n, 1, 1))
    picture = 0.5 + background + contrast * (ink - 0.5) + noise
    return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)[:, None]


def make_data() -> dict[str, NDArray[np.generic]]:
    """Calibration and held-out arrays for `demo/data/digits.npz`."""
    _, calibration, heldout = split_originals()
    rng = np.random.default_rng(SEED + 1)
    heldout = heldout.take(np.tile(np.arange(HELDOUT_ORIGINALS), COPIES_PER_HELDOUT_ORIGINAL))
    return {
        "calibration_inputs": degrade(calibration.images, calibration.images, rng),
        "calibration_labels": calibration.labels,
        "heldout_inputs": degrade(heldout.images, heldout.images, rng),
        "heldout_labels": heldout.labels,
    }


def training_batches(count: int, seed: int, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`count` images in batches, every one drawn afresh: float32 [batch,1,32,32] in 0..1, int64 [batch]."""
    originals, _, _ = split_originals()
    rng = np.random.default_rng(seed)
    for _ in range(count // batch):
        chosen = originals.take(rng.integers(0, len(originals.labels), batch))
        pictures = degrade(chosen.images, originals.images, rng).astype(np.float32) / 255
        yield torch.from_numpy(pictures), torch.from_numpy(chosen.labels)


def cnn(channels: Sequence[int]) -> nn.Sequential:
    """Convolution, batch normalisation and ReLU per entry of `channels`; then a linear read-out."""
    layers: list[nn.Module] = []
    before = 1
    for width in channels:
        if width == POOL:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
    side = SIDE >> list(channels).count(POOL)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * side * side, models.DIGITS_CLASSES))


def modules_of(network: nn.Sequential, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in network if isinstance(module, kind)]


def fit(network: nn.Sequential, count: int, peak_rate: float, seed: int) -> None:
    """AdamW under a one-cycle schedule, one pass over `count` fresh images."""
    network.train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=peak_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak_rate, total_steps=count // BATCH, pct_start=0.2)
    started = time.monotonic()
    for step, (pictures, labels) in enumerate(training_batches(count, seed, BATCH), start=1):
        logits = network(pictures.contiguous(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"  {step * BATCH} images, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    network.eval()


def widened(narrow: nn.Sequential, channels: Sequence[int], rng: np.random.Generator) -> nn.Sequential:
    """The same function with more channels: copies of channels, whose outgoing weights share the original's.

    A little noise on the copies lets them part in further training.
    """
    wide = cnn(channels)
    incoming, shares = np.zeros(1, dtype=np.int64), torch.ones(1)
    pairs = [zip(modules_of(narrow, kind), modules_of(wide, kind), strict=True) for kind in (nn.Conv2d, nn.BatchNorm2d)]
    with torch.no_grad():
        for (convolution, wide_convolution), (norm, wide_norm) in zip(*pairs, strict=True):
            old, new = convolution.out_channels, wide_convolution.out_channels
            source = np.concatenate([np.arange(old), rng.permutation(np.arange(new - old) % old)])
            weight = convolution.weight[source][:, incoming] * shares[None, :, None, None]
            noise = torch.from_numpy(rng.standard_normal(weight.shape).astype(np.float32))
            wide_convolution.weight.copy_(weight + WIDENING_NOISE * weight.std() * noise)
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(wide_norm, name).copy_(getattr(norm, name)[source])
            incoming, shares = source, torch.from_numpy(1.0 / np.bincount(source)[source]).float()
        readout = narrow[-1].weight.reshape(models.DIGITS_CLASSES, old, -1)
        wide[-1].weight.copy_((readout[:, incoming] * shares[None, :, None]).flatten(1))
        wide[-1].bias.copy_(narrow[-1].bias)
    return wide


def train_cnn(recipe: Recipe, scale: float = 1.0) -> nn.Sequential:
    """Train one CNN; `scale` < 1 shortens the run (to check repeatability, not for use)."""
    torch.manual_seed(SEED)
    network = cnn(recipe.channels)
    print(f"{recipe.name}: {recipe.channels}", flush=True)
    fit(network, int(recipe.images * scale), 4e-3, SEED + 2)
    if recipe.widen_to:
        print(f"{recipe.name}: widened to {recipe.widen_to}", flush=True)
        network = widened(network, recipe.widen_to, np.random.default_rng(SEED + 3))
        fit(network, int(recipe.widened_images * scale), 1e-4, SEED + 4)
    return network


def to_onnx(network: nn.Sequential, name: str) -> onnx.ModelProto:
    """`image` uint8 [batch,1,32,32] to `logits` float32 [batch,10], as Cast, Mul, Conv, Relu, MaxPool, Gemm."""
    nodes, constants = models.scaled_pixels("image")
    current = "pixels"
    for i, module in enumerate(network):
        previous, current = current, f"layer{i}"
        if isinstance(module, nn.Conv2d):
            arrays = folded(module, network[i + 1])
            inputs = [previous, f"weight{i}", f"bias{i}"]
            nodes.append(helper.make_node("Conv", inputs, [current], kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
            constants += constants_of(i, *arrays)
        elif isinstance(module, nn.ReLU):
            nodes.append(helper.make_node("Relu", [previous], [current]))
        elif isinstance(module, nn.MaxPool2d):
            nodes.append(helper.make_node("MaxPool", [previous], [current], kernel_shape=[2, 2], strides=[2, 2]))
        elif isinstance(module, nn.Flatten):
            nodes.append(helper.make_node("Flatten", [previous], [current]))
        elif isinstance(module, nn.Linear):
            nodes.append(helper.make_node("Gemm", [previous, f"weight{i}", f"bias{i}"], ["logits"]))
            constants += constants_of(i, module.weight.detach().numpy().T, module.bias.detach().numpy())
        else:  # batch normalisation is part of its convolution
            current = previous
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, SIDE, SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", models.DIGITS_CLASSES])
    return models.checked_model(helper.make_graph(nodes, name, [image], [logits], constants))


def constants_of(layer: int, weight: Floats, bias: Floats) -> list[onnx.TensorProto]:
    named = {f"weight{layer}": weight, f"bias{layer}": bias}
    return [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in named.items()]


def folded(convolution: nn.Module, norm: nn.Module) -> tuple[Floats, Floats]:
    """Weight [out,in,3,3] and bias [out] of a convolution that includes its batch normalisation."""
    with torch.no_grad():
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = convolution.weight * gain[:, None, None, None]
        bias = norm.bias - norm.running_mean * gain
    return weight.numpy(), bias.numpy()


def train_parity_readout(images: int) -> dict[str, Floats]:
    """Ridge regression of odd (+1) against even (-1) on the dense model's random features."""
    weights, biases = (torch.from_numpy(array) for array in models.parity_features())
    size = models.PARITY_FEATURES
    gram = torch.zeros((size, size), dtype=torch.float64)
    feature_sum, target_sum = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    count, sign_sum = 0, 0.0
    for pictures, labels in training_batches(images, SEED + 5, batch=2048):
        features = torch.relu(pictures.flatten(1) @ weights + biases)
        signs = (labels % 2 * 2 - 1).double()
        gram += features.T @ features
        feature_sum += features.sum(dim=0, dtype=torch.float64)
        target_sum += features.double().T @ signs
        count, sign_sum = count + len(labels), sign_sum + signs.sum().item()
    mean = feature_sum / count
    gram -= count * torch.outer(mean, mean)
    gram.diagonal().add_(RIDGE)
    direction = torch.linalg.solve(gram, target_sum - sign_sum * mean)
    offset = sign_sum / count - mean @ direction
    return {
        "readout": (LOGIT_SCALE * torch.stack([-direction, direction], dim=1)).float().numpy(),
        "readout_bias": (LOGIT_SCALE * torch.stack([-offset, offset])).float().numpy(),
    }


def save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """A compressed .npz whose bytes depend on its content alone (numpy stamps each member with a fixed date)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **arrays)


def main(argv: Sequence[str] | None = None) -> int:
    """Write data, CNNs and read-out below `--output` and print the digest of every file."""
    parser = argparse.ArgumentParser(prog="python -m demo.training", description="Train the demo's models.")
    parser.add_argument("--output", type=Path, default=models.HERE, help="folder that gets data/ and models/")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training images, to try things out")
    parser.add_argument("--only", action="append", help="train only the models of these names")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    folder = arguments.output / "models"
    folder.mkdir(parents=True, exist_ok=True)
    save_arrays(arguments.output / "data" / "digits.npz", make_data())
    for recipe in RECIPES:
        if arguments.only is None or recipe.name in arguments.only:
            model = to_onnx(train_cnn(recipe, arguments.scale), recipe.name)
            (folder / f"{recipe.name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    if arguments.only is None or "parity-dense" in arguments.only:
        save_arrays(folder / models.READOUT_FILE, train_parity_readout(int(PARITY_IMAGES * arguments.scale)))
    for path in sorted(arguments.output.glob("*/*.[no][pn]*")):
        print(models.sha256(path), path.relative_to(arguments.output))
    if (folder / models.READOUT_FILE).exists():
        dense = hashlib.sha256(models.parity_bytes(folder / models.READOUT_FILE)).hexdigest()
        print(dense, "parity-dense.onnx (for PARITY_SHA256 in demo/models.py)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
