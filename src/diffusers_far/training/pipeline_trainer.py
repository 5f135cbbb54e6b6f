"""Training that writes a whole pipeline, ready to use, beside every checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderDC

from ..hub import fill_model_card
from ..pipeline_far_video import FARVideoPipeline
from .make_pipeline import make_scheduler, save_pipeline
from .options import FAROptions, ModelOptions
from .train_far import FARTrainer

NUM_INFERENCE_STEPS = 25


class PipelineTrainer(FARTrainer):
    """Trains FAR; with every checkpoint, OUTPUT/pipeline is renewed, with a card that says how it was made.

    A pretrained pipeline keeps all but its transformer. Of an adapter there is OUTPUT/lora in its place.

    Args:
        sizes, options, facts: as FARTrainer's.
        autoencoder: folder of the one that made the latents.
        sample_size: height and width of frames in pixels, or one number for both.
    """

    def __init__(
        self,
        sizes: ModelOptions,
        options: FAROptions,
        autoencoder: str,
        sample_size: int | tuple[int, int],
        facts: Sequence[str],
    ) -> None:
        super().__init__(sizes, options, facts)
        self.vae, self.scheduler = AutoencoderDC.from_pretrained(autoencoder), make_scheduler("Euler")
        self.settings: dict[str, Any] = {
            "num_inference_steps": NUM_INFERENCE_STEPS,
            "num_training_frames": options.num_frames,
            "sample_size": sample_size,
            "action_names": self.action_names,
        }
        if self.pretrained is not None and self.pretrained.pipeline is not None:
            before = FARVideoPipeline.from_pretrained(self.pretrained.pipeline, transformer=self.network)
            self.scheduler = before.scheduler
            for name in ("num_inference_steps", "flex_rope_slope"):
                self.settings[name] = before.config[name]
            if before.config.num_training_frames is not None:
                frames = max(options.num_frames, before.config.num_training_frames)
                self.settings["num_training_frames"] = frames

    def save_weights(self) -> None:
        super().save_weights()
        if self.options.lora_rank is None:
            self.run.export("pipeline", self._write_pipeline)

    def _write_pipeline(self, folder: Path) -> None:
        pipeline = FARVideoPipeline(self.network, self.vae, self.scheduler, **self.settings)
        save_pipeline(pipeline, folder)
        output = Path(self.options.output_dir)
        came_from = "Trained" if self.pretrained is None else f"Fine-tuned from {self.pretrained.name}"
        card = fill_model_card(
            pipeline,
            str(output / "pipeline"),
            name=output.resolve().name,
            summary=f"{came_from} with `diffusers-far train`.",
            training=self.training_facts(),
            evaluation=self.evaluation_facts(),
        )
        card.save(folder / "README.md")
