"""Olive's own quantisation passes at their defaults, on the CPU. Runs in Olive's environment, .venv-peers/olive.

python compression_olive.py MODEL.onnx DATA.npz FOLDER: writes FOLDER/static.onnx and FOLDER/dynamic.onnx.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

DATA_SET = """
import numpy as np
from olive.data.registry import Registry

@Registry.register_dataset()
def calibration_pictures(**options):
    return [({{{name!r}: each}}, 0) for each in np.load({data!r})["calibration_inputs"]]
"""
PASSES: dict[str, dict[str, Any]] = {
    "dynamic": {"type": "OnnxDynamicQuantization"},
    "static": {"type": "OnnxStaticQuantization", "data_config": "calibration"},
}


def workflow(model: str, script: Path, output: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """One pass over one model on this machine's CPU; everything else is Olive's default."""
    accelerators = [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]
    calibration = {
        "name": "calibration",
        "type": "DataContainer",
        "user_script": str(script),
        "load_dataset_config": {"type": "calibration_pictures"},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"type": "default_dataloader", "batch_size": 32},
    }
    return {
        "input_model": {"type": "OnnxModel", "model_path": model},
        "systems": {"local": {"type": "LocalSystem", "accelerators": accelerators}},
        "data_configs": [calibration],
        "passes": {"quantise": chosen},
        "host": "local",
        "target": "local",
        "output_dir": str(output),
        "cache_dir": str(output.parent / "cache"),
        "log_severity_level": 3,
    }


def main(model: str, data: str, folder: str) -> None:
    run, onnx = importlib.import_module("olive").run, importlib.import_module("onnx")
    output = Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    script = output / "calibration_data.py"
    script.write_text(DATA_SET.format(name=onnx.load(model).graph.input[0].name, data=str(Path(data).resolve())))
    for name, chosen in PASSES.items():
        run(workflow(model, script, output / name, chosen))
        shutil.copyfile(output / name / "model.onnx", output / f"{name}.onnx")


if __name__ == "__main__":
    main(*sys.argv[1:])
