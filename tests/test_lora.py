"""LoRA on the pipeline: trained with peft, saved to files, loaded, mixed, fused and unloaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_far import FARVideoPipeline
from tests.tiny_models import (
    TOLERANCE,
    generator,
    latents,
    long_transformer,
    pipeline,
    relative_error,
)

LAYERS = ["to_q", "to_k", "to_v", "proj_out", "norm1.linear"]


def make(pipe: FARVideoPipeline, **changes: Any) -> Tensor:
    settings = {
        "num_frames": 7,
        "video_latents": latents(1, 5),
        "actions": torch.tensor([0, 1, 2, 3, 0, 1, 2]),
    }
    return pipe(generator=generator(), output_type="latent", **settings | changes).frames


def model() -> Any:
    return long_transformer(num_actions=4)


def train(seed: int, folder: Path) -> tuple[FARVideoPipeline, dict[str, Any]]:
    """A pipeline with an adapter that a few steps of training have changed, and its file."""
    pipe = pipeline(model())
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=12, target_modules=LAYERS))
    parameters = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    target = latents(1, 5, seed=10 + seed)
    for _ in range(5):
        velocity = pipe.transformer(latents(1, 5), torch.full((1, 5), 500.0), num_long_frames=0).sample
        (velocity - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    return pipe


def test_a_trained_adapter_goes_through_a_file_and_away_again(tmp_path: Path) -> None:
    plain = make(pipeline(model()))
    expected = make(train(0, tmp_path))
    assert relative_error(expected, plain) > 0.01

    pipe = pipeline(model())
    pipe.load_lora_weights(tmp_path, adapter_name="walk")
    assert pipe.get_list_adapters() == {"transformer": ["walk"]}
    assert relative_error(make(pipe), expected) < TOLERANCE  # with its own lora_alpha
    pipe.disable_lora()
    assert relative_error(make(pipe), plain) < TOLERANCE
    pipe.enable_lora()
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    assert relative_error(make(pipe), expected) < TOLERANCE
    pipe.unfuse_lora()
    assert relative_error(make(pipe), expected) < TOLERANCE
    pipe.unload_lora_weights()
    assert relative_error(make(pipe), plain) < TOLERANCE
    assert not any("lora" in name for name in pipe.transformer.state_dict())


def test_adapters_are_mixed(tmp_path: Path) -> None:
    pipe = pipeline(model())
    made = {}
    for seed, name in enumerate(["one", "two"]):
        made[name] = make(train(seed, tmp_path / name))
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
    for name, expected in made.items():
        pipe.set_adapters(name)
        assert relative_error(make(pipe), expected) < TOLERANCE
    pipe.set_adapters(["one", "two"], [0.5, 0.5])
    mixed = make(pipe)
    pipe.set_adapters("one", 0.0)
    assert relative_error(make(pipe), make(pipeline(model()))) < TOLERANCE
    assert min(relative_error(mixed, expected) for expected in made.values()) > 0.001
    pipe.delete_adapters("one")
    assert pipe.get_list_adapters() == {"transformer": ["two"]}


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0])
def test_attention_kwargs_scale_the_adapters_of_one_call(tmp_path: Path, scale: float) -> None:
    pipe = train(0, tmp_path)
    full = make(pipe)
    found = make(pipe, attention_kwargs={"scale": scale})
    assert torch.equal(make(pipe), full)
    assert torch.equal(make(pipe, attention_kwargs={"scale": 1.0}), full)
    with pytest.raises(ValueError, match="num_frames"):
        make(pipe, attention_kwargs={"scale": scale}, num_frames=0)
    assert torch.equal(make(pipe), full)
    pipe.set_adapters("default", scale)
    assert relative_error(found, make(pipe)) < TOLERANCE
    assert relative_error(found, full) > 0.001


@pytest.mark.parametrize("given", [{"scales": 0.5}, {"scale": "half"}, {"scale": float("nan")}, 0.5])
def test_wrong_attention_kwargs_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"attention_kwargs=.* must be"):
        make(pipeline(model()), attention_kwargs=given)


def test_attention_kwargs_without_an_adapter_are_refused() -> None:
    with pytest.raises(ValueError, match="no LoRA adapter to scale"):
        make(pipeline(model()), attention_kwargs={"scale": 0.5})


@pytest.mark.parametrize("fault", ["prefix", "layer", "empty", "no lora"])
def test_adapters_of_other_models_are_refused(tmp_path: Path, fault: str) -> None:
    train(0, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    if fault == "prefix":
        tensors["unet." + first] = tensors.pop(first)
    elif fault == "layer":
        tensors = {name.replace("blocks.1.", "blocks.7."): tensor for name, tensor in tensors.items()}
    elif fault == "empty":
        tensors = {}
    else:
        tensors["transformer.proj_in.weight"] = tensors.pop(first)
    pipe = pipeline(model())
    with pytest.raises(ValueError, match="not a LoRA of this transformer"):
        if tensors:
            save_file(tensors, file)
            pipe.load_lora_weights(tmp_path)
        else:
            pipe.load_lora_weights(tensors)
    assert not any("lora" in name for name in pipe.transformer.state_dict())


def test_a_fused_adapter_stays_in_the_weights(tmp_path: Path) -> None:
    expected = make(train(0, tmp_path / "lora"))
    pipe = pipeline(model())
    pipe.load_lora_weights(tmp_path / "lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert relative_error(make(pipe), expected) < TOLERANCE
    pipe.save_pretrained(tmp_path / "fused")
    assert relative_error(make(FARVideoPipeline.from_pretrained(tmp_path / "fused")), expected) < TOLERANCE


def test_an_adapter_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    train(0, tmp_path)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1.* more"):
        pipeline(long_transformer(num_actions=4, num_layers=1)).load_lora_weights(tmp_path)
