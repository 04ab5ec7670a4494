"""Trains the models that ``benchmarks.compression`` compresses, beside the demo's own CNN: four more kinds of network.

All read the demo's hard digits (demo/training.py), uint8 pictures in, ten logits out, exported by PyTorch as anybody
would. Needs the ``train`` extra. Weights are rounded to half precision and committed in it (``shrunken``); readers get
the same values in single precision (``compression_cases.load``). One thread and fixed seeds.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from benchmarks.compression_cases import FOLDER, KINDS
from demo import training

SEED, PICTURES, BATCH = 20260, 30_000, 64
EPOCHS = {"residual": 3, "mlp": 12, "transformer": 12, "recurrent": 8}
OPSET = 17
LARGE = 1024  # smaller tensors stay in single precision


def shrunken(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with large weights in half precision: half the bytes; ``compression_cases.load`` undoes it."""
    small = onnx.ModelProto()
    small.CopyFrom(model)
    for each in small.graph.initializer:
        values = numpy_helper.to_array(each)
        if values.dtype == np.float32 and values.size >= LARGE:
            each.CopyFrom(numpy_helper.from_array(values.astype(np.float16), each.name))
    return small


def composed(parts: Mapping[str, Any], forward: Callable[[Any, Any], Any]) -> nn.Module:
    """A module with these parts; ``forward`` takes the module and its input."""
    made: nn.Module = type("Composed", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def residual_block(before: int, width: int, stride: int) -> nn.Module:
    """Two convolutions and a short cut (He et al., 2016)."""
    body = nn.Sequential(
        nn.Conv2d(before, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
    )
    short_cut: nn.Module = nn.Identity()
    if stride > 1 or before != width:
        short_cut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    parts = {"body": body, "short_cut": short_cut}
    return composed(parts, lambda own, x: nn.functional.relu(own.body(x) + own.short_cut(x)))


def attention(width: int, heads: int, inner: int) -> nn.Module:
    """Self-attention and a two-layer perceptron, normalised before (Vaswani et al., 2017)."""

    def forward(own: Any, x: Any) -> Any:
        normed = own.norms[0](x)
        shape = (x.shape[0], x.shape[1], heads, x.shape[2] // heads)
        query, key, value = (part(normed).reshape(shape).transpose(1, 2) for part in (own.query, own.key, own.value))
        weights = torch.softmax(query @ key.transpose(2, 3) * shape[3] ** -0.5, dim=-1)
        x = x + own.out((weights @ value).transpose(1, 2).reshape(x.shape))
        return x + own.outer(nn.functional.gelu(own.inner(own.norms[1](x))))

    parts = {"norms": nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])}
    parts |= {name: nn.Linear(width, width) for name in ("query", "key", "value", "out")}
    return composed(parts | {"inner": nn.Linear(width, inner), "outer": nn.Linear(inner, width)}, forward)


def transformer(width: int = 96, layers: int = 3) -> nn.Module:
    """Patches of 4×4 pixels as 64 tokens (Dosovitskiy et al., 2021)."""

    def forward(own: Any, x: Any) -> Any:
        patches = x.reshape(-1, 8, 4, 8, 4).transpose(2, 3).reshape(-1, 64, 16)
        return own.read_out(own.norm(own.layers(own.embed(patches) + own.position)).mean(dim=1))

    parts = {"embed": nn.Linear(16, width), "position": nn.Parameter(torch.zeros(1, 64, width))}
    parts["layers"] = nn.Sequential(*(attention(width, 4, 3 * width) for _ in range(layers)))
    return composed(parts | {"norm": nn.LayerNorm(width), "read_out": nn.Linear(width, 10)}, forward)


def recurrent(width: int = 144) -> nn.Module:
    """Reads the rows of a picture from top to bottom."""
    parts = {"cells": nn.LSTM(32, width, 2, batch_first=True), "read_out": nn.Linear(width, 10)}
    return composed(parts, lambda own, x: own.read_out(own.cells(x.reshape(-1, 32, 32))[0][:, -1]))


def residual() -> nn.Module:
    """A stem and six blocks at three resolutions."""
    sizes = ((32, 32, 1), (32, 32, 1), (32, 48, 2), (48, 48, 1), (48, 64, 2), (64, 64, 1))
    stem = (nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    blocks = [residual_block(*each) for each in sizes]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def perceptron() -> nn.Module:
    """Three dense layers."""
    sizes = (nn.Linear(1024, 384), nn.ReLU(), nn.Linear(384, 256), nn.ReLU(), nn.Linear(256, 10))
    return nn.Sequential(nn.Flatten(), *sizes)


def network(kind: str) -> nn.Module:
    """An untrained network of this kind: uint8 pictures [batch,1,32,32] to logits [batch,10]."""
    torch.manual_seed(SEED)
    makers = {"residual": residual, "mlp": perceptron, "transformer": transformer, "recurrent": recurrent}
    return nn.Sequential(composed({}, lambda _, pictures: pictures.float() * (1 / 255)), makers[kind]())


def train(kind: str, scale: float) -> onnx.ModelProto:
    """Train one network from scratch on pictures of the demo's training originals."""

    count = int(PICTURES * scale)
    drawn = list(training.training_batches(count, SEED + 1, BATCH))
    pictures = torch.cat([each for each, _ in drawn]).mul(255).round().to(torch.uint8)
    labels = torch.cat([each for _, each in drawn])
    model, started = network(kind), time.monotonic()
    rate, epochs = 3e-3 if kind != "transformer" else 1.5e-3, EPOCHS[kind]
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.03)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        for batch in torch.randperm(len(labels))[: steps // epochs * BATCH].split(BATCH):
            loss = torch.nn.functional.cross_entropy(model(pictures[batch]), labels[batch], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        print(f"{kind}: epoch {epoch + 1}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return exported(model.eval(), pictures[:2])


def exported(model: nn.Module, example: Any) -> onnx.ModelProto:
    """PyTorch's own export, weights rounded to what half precision holds."""

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() >= LARGE:
                parameter.copy_(parameter.half().float())
    file = io.BytesIO()
    axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"], "dynamic_axes": axes}
    # batch normalisation stays a node of its own, as in many models that people hand in
    options: dict[str, Any] = {"opset_version": OPSET, "do_constant_folding": True, "dynamo": False}
    training_mode = torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(model, (example,), file, training=training_mode, **names, **options)
    return onnx.load_from_string(file.getvalue())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression_models", description=__doc__)
    parser.add_argument("--only", action="append", choices=KINDS, help="train only these kinds")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the ONNX files")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pictures, to try things out")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for kind in arguments.only or KINDS:
        path = arguments.output / f"{kind}.onnx"
        path.write_bytes(shrunken(train(kind, arguments.scale)).SerializeToString(deterministic=True))
        print(f"{path.name}: {path.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
