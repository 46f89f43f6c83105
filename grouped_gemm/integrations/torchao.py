"""A config for torchao's ``quantize_`` that runs the grouped GEMMs of modules on this package.

Importing it registers `GroupedGemmConfig` with torchao, and changes nothing else. It needs torchao to be installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.nn import Module

from grouped_gemm.core.preference import KernelPreference, Preference
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.integrations.torch_function import override_torch
from grouped_gemm.selection import checks

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler
except ImportError as error:
    raise ImportError(
        "grouped_gemm.integrations.torchao: expected torchao >= 0.18, which has handlers of quantize_; found "
        f"none, or one without them ({error}). Install it: pip install 'torchao>=0.18'"
    ) from error

_ELSEWHERE = ("mslk", "cutedsl")  # of torchao's KernelPreference: libraries that no backend of ours calls


@dataclass(frozen=True)
class GroupedGemmConfig(AOBaseConfig):  # type: ignore[misc]
    """How ``torchao.quantization.quantize_`` changes experts: their calls of torch's grouped GEMM run on this package.

    >>> quantize_(model, GroupedGemmConfig(recipe="fp8_blockwise"), filter_fn=lambda m, name: isinstance(m, Experts))

    ``filter_fn`` selects the modules whose forward calls ``torch._grouped_mm`` or `torch.nn.functional.grouped_mm`,
    with parameters (E, ., .) of their own or in their children. Each gets a subclass of its class whose forward is
    decorated with `grouped_gemm.override_torch`. Parameters, hooks and the state dict stay as they are: weights are
    quantized in each call. Linear layers are not touched, so torchao's configs for them apply beside it.

    Args:
        recipe: how operands are quantized, as in `grouped_gemm.grouped_mm`. None: not at all.
        group_alignment: the caller guarantees it for every group, as in `grouped_gemm.grouped_mm`.
        kernel_preference: as in `grouped_gemm.grouped_mm`, or torchao's ``KernelPreference``: AUTO, TORCH, EMULATED
            and, where the installed torchao has them, DEEPGEMM and TRITON.

    Raises:
        ValueError: an option is not valid. MSLK and CUTEDSL are not: no backend of this package calls them.
    """

    recipe: Recipe | str | None = Recipe.FP8_ROWWISE
    group_alignment: int = 1
    kernel_preference: Preference = KernelPreference.AUTO

    def __post_init__(self) -> None:
        preference: Any = self.kernel_preference
        name = str(getattr(preference, "value", preference)).lower()  # torchao's is an Enum of strings
        if name in _ELSEWHERE:
            expected = "one of AUTO, TORCH, EMULATED, DEEPGEMM, TRITON: this package has no backend on " + name.upper()
            checks.fail("kernel_preference", expected, repr(preference))
        recipe = None if self.recipe is None else Recipe.parse(self.recipe)
        object.__setattr__(self, "recipe", recipe)
        object.__setattr__(self, "kernel_preference", KernelPreference.parse(name))
        checks.check_options(None, self.group_alignment)


FP8GroupedMMConfig = GroupedGemmConfig
"""The name that torchtitan used for torchao's config of grouped GEMMs. As there, the recipe is fp8_rowwise."""


@register_quantize_module_handler(GroupedGemmConfig)
def _convert(module: Module, config: GroupedGemmConfig) -> Module:
    """Gives ``module`` the class of its class and ``config``, in place.

    Raises:
        ValueError: the module has no parameters with 3 dimensions, or cannot be converted.
    """
    name = type(module).__name__
    found = getattr(type(module), "_grouped_gemm_config", None)
    if found == config:
        return module
    if found is not None:
        checks.fail("quantize_", "a module without a GroupedGemmConfig", f"{name}, which has {found}")
    if not any(p.dim() == 3 for p in module.parameters()):
        expected = "a module with parameters (E, ., .); pass filter_fn, which selects linear layers by default"
        checks.fail("quantize_", expected, name)
    if "forward" in vars(module):
        expected = "a module whose forward is a method of its class; convert it before other code replaces forward"
        checks.fail("quantize_", expected, f"{name} with a forward of its own")
    module.__class__ = _class_of(type(module), config)
    return module


_classes: dict[tuple[type[Module], GroupedGemmConfig], type[Module]] = {}


def _class_of(cls: type[Module], config: GroupedGemmConfig) -> type[Module]:
    """The subclass of ``cls`` whose forward runs inside an override. One for each class and config."""
    key = cls, config
    if key not in _classes:
        block = override_torch(
            config.recipe, group_alignment=config.group_alignment, kernel_preference=config.kernel_preference
        )
        body = {"forward": block(cls.forward), "_grouped_gemm_config": config, "__module__": cls.__module__}
        _classes[key] = type(f"GroupedGemm{cls.__name__}", (cls,), body)
    return _classes[key]
