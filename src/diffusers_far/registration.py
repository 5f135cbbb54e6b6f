"""What an import of this package tells diffusers, whichever of its modules comes first.

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
