"""Training that writes a whole pipeline, ready to use, beside every checkpoint."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import AutoencoderDC

from ..hub import fill_model_card
from ..pipeline_far_video import FARVideoPipeline
from ..transformer_far import FARTransformer3DModel
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
        self.autoencoder, self.sample_size = autoencoder, sample_size

    @cached_property
    def _parts(self) -> dict[str, Any]:
        """Of the pipeline, but for its transformer: as they were, or new ones."""
        num_frames = self.options.num_frames
        if self.pretrained is not None and self.pretrained.pipeline is not None:
            before = FARVideoPipeline.from_pretrained(self.pretrained.pipeline, transformer=self.network)
            vae, scheduler = before.vae, before.scheduler
            defaults = {name: before.config[name] for name in ("num_inference_steps", "flex_rope_slope")}
            num_frames = max(num_frames, before.config.num_training_frames or 0)
        else:
            vae, scheduler = AutoencoderDC.from_pretrained(self.autoencoder), make_scheduler("Euler")
            defaults = {"num_inference_steps": NUM_INFERENCE_STEPS}
        return defaults | {
            "vae": vae,
            "scheduler": scheduler,
            "num_training_frames": num_frames,
            "sample_size": self.sample_size,
            "action_names": self.action_names,
        }

    def save_weights(self) -> None:
        super().save_weights()
        if self.options.lora_rank is None:
            self.run.export("pipeline", self._write_pipeline)

    def _write_pipeline(self, model: FARTransformer3DModel, folder: Path) -> None:
        pipeline = FARVideoPipeline(model, **self._parts)
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
