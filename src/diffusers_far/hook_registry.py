"""Which of diffusers' hooks the parts of the model take: those for memory, and none that caches.

Every caching technique of diffusers (`transformer.enable_cache`, `apply_pyramid_attention_broadcast` and so
on) gives one denoising step what an earlier one computed, and takes for granted that all forwards of a
sampling loop are for the same tokens. FAR's are not: the first step of a frame computes other frames as well,
the context changes with every frame, and a layer that is skipped leaves no keys and values for `FARCache`. So
they are refused where they are enabled. `FARCache` is what makes FAR's steps cheap.
"""

from typing import Any, NoReturn

from diffusers.hooks import HookRegistry, ModelHook


def refuse_caching(technique: str) -> NoReturn:
    """Raise the ValueError that names a caching technique."""
    raise ValueError(
        f"{technique} caches what one denoising step computes for later ones, but FAR's steps differ in "
        "their frames and context: it would give wrong videos. Keys and values of the context are kept "
        "already (use_cache=True of the pipeline)"
    )


class FARHookRegistry(HookRegistry):
    """Hooks of a module, none of which keeps state from one forward for the next."""

    def register_hook(self, hook: ModelHook, name: str) -> None:
        if hook._is_stateful:
            refuse_caching(type(hook).__name__)
        super().register_hook(hook, name)


class RefusesCaching:
    """A module that has a [`FARHookRegistry`] where diffusers gives it a registry of its own."""

    @property
    def _diffusers_hook(self) -> FARHookRegistry:
        if (registry := self.__dict__.get("_far_hook_registry")) is None:
            raise AttributeError("_diffusers_hook")
        return registry

    @_diffusers_hook.setter
    def _diffusers_hook(self, registry: Any) -> None:
        self.__dict__["_far_hook_registry"] = FARHookRegistry(self)
