"""Training that writes a whole pipeline, ready to use, beside every checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from ..hub import fill_model_card
from ..transformer_far import FARTransformer3DModel
from .make_pipeline import save_pipeline
from .options import FAROptions, ModelOptions
from .train_far import FARTrainer


class PipelineTrainer(FARTrainer):
    """Trains FAR; with every checkpoint, OUTPUT/pipeline is renewed, with a card that says how it was made.

    A pretrained pipeline keeps all but its transformer. Of an adapter there is OUTPUT/lora in its place.

    Args:
        sizes, options, facts: as FARTrainer's; `autoencoder` of the options is the one that made the latents.
        sample_size: height and width of frames in pixels, or one number for both.
    """

    def __init__(
        self,
        sizes: ModelOptions,
        options: FAROptions,
        sample_size: int | tuple[int, int],
        facts: Sequence[str],
    ) -> None:
        super().__init__(sizes, options, facts)
        self.sample_size = sample_size

    def save_weights(self) -> None:
        super().save_weights()
        if self.options.lora_rank is None:
            self.run.export("pipeline", self._write_pipeline)

    def _write_pipeline(self, model: FARTransformer3DModel, folder: Path) -> None:
        pipeline = self.make_pipeline(model)
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
