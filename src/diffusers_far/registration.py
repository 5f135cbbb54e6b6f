"""What an import of this package does, whichever of its modules comes first.

It tells diffusers of the package, and gives the model and the pipeline the methods for published files and
model cards, which their own modules know nothing of.

A model_index.json names the library of each component. From the Hub, diffusers takes only the libraries in
a table of its own; others need `trust_remote_code=True`. Importing diffusers takes seconds, so nothing here
imports it: we wait until the module with the table has been imported. No pipeline can be built, saved or
loaded before that.
"""

import sys
from types import ModuleType

from wrapt import when_imported

PACKAGE = "diffusers_far"
# The second name is in older checkpoints, saved by a program that had imported that module by its path.
LIBRARIES = (PACKAGE, f"{PACKAGE}.transformer_far")


@when_imported("diffusers.pipelines.pipeline_loading_utils")
def register(loading: ModuleType) -> None:
    """Enter the package where diffusers looks for the classes of components and pipelines.

    Args:
        loading: the module of diffusers that has just been imported.
    """
    for library in LIBRARIES:
        loading.LOADABLE_CLASSES[library] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
    # `DiffusionPipeline.from_pretrained` looks for the pipeline's class in diffusers itself, which imports
    # its classes when they are first asked for, from the submodules in this table. With DIFFUSERS_SLOW_IMPORT
    # there is no table, and only `FARVideoPipeline.from_pretrained` loads.
    table = getattr(sys.modules["diffusers"], "_class_to_module", None)
    if table is not None:
        table["FARVideoPipeline"] = PACKAGE
        sys.modules[f"diffusers.{PACKAGE}"] = sys.modules[PACKAGE]


@when_imported(f"{PACKAGE}.transformer_far")
def add_to_model(module: ModuleType) -> None:
    """Give the model `from_single_file` for the published files, and `push_to_hub` a filled model card."""
    from . import hub, single_file

    module.FARTransformer3DModel.from_single_file = classmethod(single_file.from_single_file)
    module.FARTransformer3DModel._upload_folder = hub.upload_folder


@when_imported(f"{PACKAGE}.pipeline_far_video")
def add_to_pipeline(module: ModuleType) -> None:
    """Give the pipeline's `push_to_hub` a filled model card."""
    from . import hub

    module.FARVideoPipeline._upload_folder = hub.upload_folder
