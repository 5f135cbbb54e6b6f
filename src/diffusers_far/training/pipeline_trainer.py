"""Training that writes a whole pipeline, ready to use, beside every checkpoint."""

from collections.abc import Sequence
from pathlib import Path

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

    Args:
        sizes, options: as FARTrainer's.
        autoencoder: folder of the one that made the latents.
        sample_size: height and width of frames in pixels, or one number for both.
        facts: lines for the model card about the data.
    """

    def __init__(
        self,
        sizes: ModelOptions,
        options: FAROptions,
        autoencoder: str,
        sample_size: int | tuple[int, int],
        facts: Sequence[str],
    ) -> None:
        super().__init__(sizes, options)
        self.autoencoder = AutoencoderDC.from_pretrained(autoencoder)
        self.sample_size, self.facts = sample_size, facts
        self.validation: dict[str, float] = {}

    def validate(self) -> dict[str, float]:
        self.validation = super().validate()
        return self.validation

    def save_weights(self) -> None:
        super().save_weights()
        self.run.export("pipeline", self._write_pipeline)

    def _write_pipeline(self, model: FARTransformer3DModel, folder: Path) -> None:
        pipeline = FARVideoPipeline(
            model,
            self.autoencoder,
            make_scheduler("Euler"),
            num_inference_steps=NUM_INFERENCE_STEPS,
            num_training_frames=self.options.num_frames,
            sample_size=self.sample_size,
            action_names=self._action_names(),
        )
        save_pipeline(pipeline, folder)
        output = Path(self.options.output_dir)
        card = fill_model_card(
            pipeline,
            str(output / "pipeline"),
            name=output.resolve().name,
            summary="Trained with `diffusers-far train`.",
            training=self._training(),
            evaluation=self._evaluation(),
        )
        card.save(folder / "README.md")

    def _action_names(self) -> list[str] | None:
        """What the data call groups of actions, or numbers of vectors."""
        space = self.network.action_space
        return None if space is None else list(self.batches.videos.action_names) or None

    def _training(self) -> str:
        options, clock = self.options, self.run.clock
        clips = options.batch_size * options.gradient_accumulation_steps
        lines = [
            *self.facts,
            f"{clock.step:,} steps of {clips} clips of up to {options.num_frames} frames, in "
            f"{clock.seconds / 60:.1f} minutes of training",
            f"learning rate {options.learning_rate:g}, {options.lr_scheduler}; seed {options.seed}",
        ]
        return "\n".join(f"- {line}" for line in lines)

    def _evaluation(self) -> str:
        if not self.validation:
            return "Not measured yet."
        lines = [f"- {name.replace('_', ' ')}: {value:.4f}" for name, value in self.validation.items()]
        return "\n".join(["On clips of the held-out videos:", "", *lines])
