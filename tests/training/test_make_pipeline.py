"""training/make_pipeline.py: two trained parts become one pipeline folder."""

import pytest
import torch
from diffusers import AutoencoderDC, UniPCMultistepScheduler

from diffusers_far import FARTransformer3DModel, FARVideoPipeline
from diffusers_far.training.make_pipeline import main


@pytest.fixture
def parts(tmp_path):
    """Folders of a transformer and an autoencoder for 4-channel latents."""
    torch.manual_seed(0)
    size = {"in_channels": 4, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16}
    FARTransformer3DModel(**size, axes_dims_rope=(4, 6, 6), num_actions=2).save_pretrained(tmp_path / "far")
    blocks = {"block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    config = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()}
    AutoencoderDC(latent_channels=4, **config, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    return ["--transformer", str(tmp_path / "far"), "--autoencoder", str(tmp_path / "vae")]


def test_folder_loads_with_its_defaults(parts, tmp_path):
    output = tmp_path / "pipeline"
    main(
        [
            *parts,
            "--output",
            str(output),
            "--solver",
            "UniPC",
            "--num-inference-steps",
            "3",
            "--sample_size",
            "16",
            "--dtype",
            "bfloat16",
        ]
    )
    pipeline = FARVideoPipeline.from_pretrained(output)
    assert pipeline.transformer.dtype == torch.float32  # what is stored in bfloat16 computes in float32
    assert (
        isinstance(pipeline.scheduler, UniPCMultistepScheduler) and pipeline.scheduler.config.use_flow_sigmas
    )
    assert (pipeline.config.num_inference_steps, pipeline.config.sample_size) == (3, 16)
    assert pipeline.vae.config.scaling_factor == 0.5
    assert pipeline(num_frames=2, actions=[0, 1], output_type="pt").frames.shape == (1, 2, 3, 16, 16)
    assert not list(tmp_path.glob("*.partial"))
    for file in output.rglob("*.json"):
        assert str(tmp_path) not in file.read_text()  # no folder of this machine
    stored = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    weights = sum(p.numel() for part in (pipeline.transformer, pipeline.vae) for p in part.parameters())
    assert stored < 2.5 * weights + 50_000


def test_existing_output_is_refused(parts, tmp_path):
    (tmp_path / "pipeline").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        main([*parts, "--output", str(tmp_path / "pipeline")])


def test_parts_that_do_not_fit_are_refused(parts, tmp_path):
    FARTransformer3DModel(
        in_channels=8, num_layers=1, num_attention_heads=1, attention_head_dim=16, axes_dims_rope=(4, 6, 6)
    ).save_pretrained(tmp_path / "other")
    arguments = ["--transformer", str(tmp_path / "other"), *parts[2:], "--output", str(tmp_path / "pipeline")]
    with pytest.raises(ValueError, match="4 channels; the transformer takes 8"):
        main(arguments)
    assert not (tmp_path / "pipeline").exists()
