"""Weight norm (arXiv 1602.07868) put on plain convolutions for training and folded away again, exactly in both directions."""

import torch
from torch import nn
from torch.nn.utils import parametrize


_GAIN, _DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"


class WeightNorm(nn.Module):
    """weight = gain * direction / |direction| per index of dimension 0. It starts with the weight as direction, so no bit changes."""

    @staticmethod
    def norm(direction: torch.Tensor) -> torch.Tensor:
        """(n, ...) -> (n, 1, ...), never zero."""
        return direction.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (direction.dim() - 1))

    def forward(self, gain: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        return direction * (gain / self.norm(direction))

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.norm(weight), weight


def is_weight_normed(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight")


def apply_weight_norm(module: nn.Module) -> None:
    """Replaces `module.weight` by a trainable gain and direction of the same value."""
    parametrize.register_parametrization(module, "weight", WeightNorm())


def remove_weight_norm(module: nn.Module) -> None:
    """Replaces gain and direction by the plain weight they stand for."""
    weight = module.weight.detach().clone()
    trained = module.parametrizations.weight.original1.requires_grad
    parametrize.remove_parametrizations(module, "weight")
    # torch leaves a tensor that is no parameter where gradients are off.
    del module.weight
    module.weight = nn.Parameter(weight, requires_grad=trained)


def fold_weights(state_dict: dict[str, torch.Tensor], prefixes: list[str]) -> None:
    """Turns `PREFIX.parametrizations...` pairs of a state dict into plain `PREFIX.weight`, in place."""
    for prefix in prefixes:
        gain, direction = state_dict.pop(f"{prefix}.{_GAIN}"), state_dict.pop(f"{prefix}.{_DIRECTION}")
        state_dict[f"{prefix}.weight"] = WeightNorm()(gain, direction)


def unfold_weights(state_dict: dict[str, torch.Tensor], prefixes: list[str]) -> None:
    """The reverse of `fold_weights` for those prefixes that have a plain weight, in place."""
    for prefix in prefixes:
        if f"{prefix}.weight" in state_dict:
            gain, direction = WeightNorm().right_inverse(state_dict.pop(f"{prefix}.weight"))
            state_dict[f"{prefix}.{_GAIN}"], state_dict[f"{prefix}.{_DIRECTION}"] = gain, direction
