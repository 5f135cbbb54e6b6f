"""What an action is: an integer, an integer of each of several groups, or a vector of numbers.

Dimensions: B batch, F frames, G groups, A numbers of a vector.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ActionSpace:
    """What leads from one frame of a model to the next.

    Args:
        num_actions: an int: one action per frame, `[B, F]` integers (published). Several: sizes of groups of
            which each has an action per frame, such as a keyboard and a mouse: `[B, F, G]` integers. -1, and
            the number of actions of a group, are the null condition.
        action_dim: A of continuous actions, `[B, F, A]` floats, in place of `num_actions`. A vector with NaN
            is the null condition.
        mean, std: of each of these numbers in the training data, by which the model normalises them.
    """

    num_actions: int | tuple[int, ...] | None = None
    action_dim: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ActionSpace | None":
        """That of a model's configuration; None for a model without actions."""
        if not config.get("num_actions") and not config.get("action_dim"):
            return None
        sizes, mean, std = (
            tuple(value) if isinstance(value, list | tuple) else value
            for value in map(config.get, ("num_actions", "action_mean", "action_std"))
        )
        return cls(sizes, config.get("action_dim"), mean, std)

    @property
    def is_vector(self) -> bool:
        return self.action_dim is not None

    @property
    def is_grouped(self) -> bool:
        return isinstance(self.num_actions, tuple)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Actions of each group; one size where there are no groups, none for vectors."""
        if self.num_actions is None:
            return ()
        return self.num_actions if isinstance(self.num_actions, tuple) else (self.num_actions,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one action."""
        if self.action_dim is not None:
            return (self.action_dim,)
        return (len(self.sizes),) if self.is_grouped else ()

    def __str__(self) -> str:
        if self.is_vector:
            return f"vectors of {self.action_dim} numbers"
        return f"groups of {', '.join(map(str, self.sizes))}" if self.is_grouped else str(self.num_actions)

    @property
    def null_value(self) -> float:
        """What each number of the null action is."""
        return math.nan if self.is_vector else -1

    def null(self, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """Null actions, `[*shape, *self.shape]`."""
        return torch.full((*shape, *self.shape), self.null_value, device=device)

    def drop(self, actions: Tensor, dropped: Tensor) -> Tensor:
        """Actions with the null action where `dropped`, which has a value per action, says so."""
        return torch.where(dropped.reshape(*dropped.shape, *(1,) * len(self.shape)), self.null_value, actions)

    def rows(self, actions: Tensor) -> Tensor:
        """Rows of integers in a table that has, for each group, a row per action and one for the null."""
        if not self.is_grouped:
            return torch.where(actions < 0, self.sizes[0], actions)
        sizes = torch.tensor(self.sizes, device=actions.device)
        return torch.where(actions < 0, sizes, actions) + (sizes + 1).cumsum(0) - (sizes + 1)

    def features(self, actions: Tensor) -> Tensor:
        """What a model reads of vectors, `[..., A + 1]`: them, normalised, and whether they are the null."""
        values = actions.float()
        is_null = values.isnan().any(dim=-1, keepdim=True)
        if self.mean is not None:
            values = values - values.new_tensor(self.mean)
        if self.std is not None:
            values = values / values.new_tensor(self.std)
        return torch.cat([values.masked_fill(is_null, 0.0), is_null.float()], dim=-1)


def check_actions(num_actions: Any, action_dim: Any, mean: Any, std: Any) -> None:
    """Raise a ValueError for options of a model that make no [`ActionSpace`]."""
    if num_actions is not None and action_dim is not None:
        raise ValueError(f"{num_actions=} and {action_dim=}: actions are integers or vectors; give one")
    sizes = num_actions if isinstance(num_actions, list | tuple) else [num_actions]
    if num_actions is not None and (not sizes or not all(_is_count(size) for size in sizes)):
        raise ValueError(
            f"{num_actions=} must be an int of at least 1, or the sizes of groups, each of them so"
        )
    if action_dim is not None and not _is_count(action_dim):
        raise ValueError(f"{action_dim=} must be an int of at least 1")
    for name, values, least in (("action_mean", mean, -math.inf), ("action_std", std, 0)):
        if values is None:
            continue
        are_numbers = isinstance(values, list | tuple) and all(
            isinstance(value, int | float) and least < value < math.inf for value in values
        )
        if not are_numbers or len(values) != (action_dim or 0):
            more = " greater than 0" if least == 0 else ""
            raise ValueError(
                f"{name}={values} must be {action_dim or 0} numbers{more}, as {action_dim=} says"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
