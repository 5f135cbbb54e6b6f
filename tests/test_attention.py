"""Attention backends of diffusers: the one that is set computes all attention, or is refused."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import Tensor

from diffusers_far import FARTransformer3DModel, FARVideoPipeline, attention
from tests.python_process import run_python
from tests.tiny_models import TOLERANCE, latents, long_transformer, pipeline, relative_error, transformer

REGISTRY = attention_dispatch._AttentionBackendRegistry
MATH = AttentionBackendName._NATIVE_MATH
LAYERS, FRAMES, STEPS = 2, 6, 2


@pytest.fixture(params=[transformer, long_transformer], ids=["base", "long"])
def pipe(request: pytest.FixtureRequest) -> FARVideoPipeline:
    return pipeline(request.param(), num_inference_steps=STEPS)


@pytest.fixture(autouse=True)
def nothing_set() -> Iterator[None]:
    """`set_attention_backend` leaves its choice behind for all models of the process."""
    before = REGISTRY.get_active_backend()[0]
    yield
    REGISTRY.set_active_backend(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often attention was computed by the math backend, and by our own way."""
    counts = {"math": 0, "own": 0}

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setitem(REGISTRY._backends, MATH, counted("math", REGISTRY._backends[MATH]))
    monkeypatch.setattr(attention, "matmul_attention", counted("own", attention.matmul_attention))
    return counts


def frames(pipe: FARVideoPipeline, slope: float = 0.0) -> Tensor:
    return pipe(
        num_frames=FRAMES, latents=latents(1, FRAMES), output_type="latent", flex_rope_slope=slope
    ).frames


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("by", ["method", "context", "both"])
def test_the_backend_that_is_set_computes_everything(
    pipe: FARVideoPipeline, calls: dict[str, int], by: str, slope: float
) -> None:
    expected = frames(pipe, slope)
    assert calls["math"] == 0 and calls["own"] > 0
    calls["own"] = 0
    if by == "context":
        with attention_backend(MATH):
            found = frames(pipe, slope)
    else:
        pipe.transformer.set_attention_backend(MATH.value)
        with attention_backend(AttentionBackendName.NATIVE if by == "both" else MATH):
            found = frames(pipe, slope)
    assert calls == {"math": LAYERS * FRAMES * STEPS, "own": 0}
    assert relative_error(found, expected) <= TOLERANCE


def test_resetting_the_backend(pipe: FARVideoPipeline, calls: dict[str, int]) -> None:
    pipe.transformer.set_attention_backend("native")
    frames(pipe)
    assert calls["own"] == 0
    pipe.transformer.reset_attention_backend()
    frames(pipe)
    assert calls["own"] > 0


def test_the_environment_sets_the_backend() -> None:
    program = (
        "import torch\n"
        "from diffusers_far import attention\n"
        "from tests.tiny_models import latents, transformer\n"
        "from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry\n"
        "assert registry.get_active_backend()[0] == '_native_math'\n"
        "def own(*arguments): raise AssertionError('not the backend that was set')\n"
        "attention.matmul_attention = own\n"
        "transformer()(latents(1, 1), torch.full((1, 1), 500.0))\n"
    )
    environment = os.environ | {"DIFFUSERS_ATTN_BACKEND": MATH.value}
    done = run_python(["-c", program], env=environment, imported="torch")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", sorted({*AttentionBackendName} - {*attention.MASKED_BACKENDS}))
def test_backends_that_lose_masks_are_refused(
    backend: AttentionBackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformer()
    words = f"attention backend '{backend.value}' does not apply the masks of FAR"
    with pytest.raises(ValueError, match=words):
        model.set_attention_backend(backend.value)
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}
    # As if it were installed, and set for all models.
    monkeypatch.setitem(REGISTRY._backends, backend, lambda query, **_: query)
    monkeypatch.setitem(REGISTRY._supported_arg_names, backend, {"query"})
    REGISTRY.set_active_backend(backend)
    with pytest.raises(ValueError, match=words):
        model(latents(1, 2), torch.full((1, 2), 500.0))


@pytest.mark.parametrize("backend", [AttentionBackendName.FLEX, AttentionBackendName.NATIVE])
@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_backends_that_are_taken_apply_masks(backend: AttentionBackendName, slope: float) -> None:
    for model in (transformer(), long_transformer()):
        inputs = {"hidden_states": latents(1, 6), "timestep": torch.full((1, 6), 300.0)}
        with torch.no_grad(), attention_backend(MATH):
            expected = model(**inputs, flex_rope_slope=slope).sample
        with torch.no_grad(), attention_backend(backend):
            assert relative_error(model(**inputs, flex_rope_slope=slope).sample, expected) <= TOLERANCE


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of the following"):
        FARTransformer3DModel(num_layers=1).set_attention_backend("flush")
