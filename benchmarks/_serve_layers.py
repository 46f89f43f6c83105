"""The experts that serve.py measures: modules of transformers in bf16 and in FP8, by the names of implementations.

T, k, E, H, I: tokens, experts per token, experts, hidden and intermediate features.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _common import FP8
from _experts_layers import Case, topk_ids
from torch import Tensor
from torch.nn import Module, Parameter

from grouped_gemm import Recipe, reference

DTYPES = ("bf16", "fp8")
RECIPE = "grouped_gemm_fp8"  # a bf16 model in fp8_blockwise, whose weights are quantized once
NAMES = {
    "bf16": ("grouped_gemm", RECIPE, "grouped_mm", "batched_mm", "eager", "deepgemm", "sonicmoe"),
    "fp8": ("grouped_gemm", "grouped_mm", "batched_mm", "eager", "deepgemm"),
}
COMPILED = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")
MODES = ("eager", "graph", *COMPILED)
_COPY_LIMIT = 8 * 2**30  # bytes of weights that batched_mm may copy
_BLOCKS = (1, 128, 128)  # of weights, (E, out, in)
_SIDE = 128


class Shape(NamedTuple):
    """Sizes of the experts of a model, and the type by which transformers knows it."""

    model: str
    experts: int
    hidden: int
    intermediate: int
    k: int

    def case(self, tokens: int) -> Case:
        return Case(self.experts, self.hidden, self.intermediate, self.k, tokens)

    def config(self, **options: Any) -> Any:
        """The config of a model with these experts."""
        import transformers

        kind, experts = _CONFIGS[self.model]
        sizes = {"hidden_size": self.hidden, "moe_intermediate_size": self.intermediate, experts: self.experts}
        return getattr(transformers, kind)(num_experts_per_tok=self.k, hidden_act="silu", **sizes, **options)


_CONFIGS = {
    "qwen2_moe": ("Qwen2MoeConfig", "num_experts"),
    "qwen3_moe": ("Qwen3MoeConfig", "num_experts"),
    "deepseek_v3": ("DeepseekV3Config", "n_routed_experts"),
}
SHAPES = {
    "qwen1.5-moe": Shape("qwen2_moe", 60, 2048, 1408, 4),
    "qwen3-30b": Shape("qwen3_moe", 128, 2048, 768, 8),
    "dsv3-ep8": Shape("deepseek_v3", 32, 7168, 2048, 8),
}
TINY = {"tiny": Shape("qwen3_moe", 4, 128, 128, 2)}  # for --device cpu


class Inputs(NamedTuple):
    """The arguments of experts: x (T, H) and weights (T, k) in bf16, as routers return them, and ids (T, k)."""

    x: Tensor
    ids: Tensor
    weights: Tensor


def inputs_of(case: Case, device: str) -> Inputs:
    """Random tokens with random, distinct experts; the same for all modules of a case."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.tokens, case.hidden, generator=generator)
    weights = torch.rand(case.tokens, case.k, generator=generator).softmax(-1)
    ids = topk_ids(case, "random")
    return Inputs(x.to(device, torch.bfloat16), ids.to(device), weights.to(device, torch.bfloat16))


class Weights:
    """Random weights of one shape in one dtype, which the modules of all implementations share.

    Attributes:
        gate_up: (E, 2I, H), in bf16 or float8_e4m3fn.
        down: (E, H, I).
        scales: of gate_up and down in fp8, a scale for each 128x128 block, (E, out / 128, in / 128); empty in bf16.
    """

    def __init__(self, shape: Shape, dtype: str, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        generator = torch.Generator(device).manual_seed(1)
        num_experts, hidden, inner = shape.experts, shape.hidden, shape.intermediate
        sizes = ((2 * inner, hidden), (hidden, inner))
        found = [_random(num_experts, *size, dtype, generator) for size in sizes]
        self.gate_up, self.down = (Parameter(w, requires_grad=dtype == "bf16") for w, _ in found)
        self.scales = tuple(Parameter(scale, requires_grad=False) for _, scale in found if scale is not None)

    def module(self, name: str) -> Module:
        """The experts of transformers with these weights, run by the implementation ``name``."""
        config = self.shape.config()
        config._experts_implementation = name
        with torch.device("meta"):
            module = experts_class(self.shape.model)(config)
            module = fp8_experts(module, config) if self.dtype == "fp8" else module
        tensors = {"gate_up_proj": self.gate_up, "down_proj": self.down}
        tensors |= {f"{parameter}_scale_inv": scale for parameter, scale in zip(list(tensors), self.scales)}
        for parameter, tensor in tensors.items():
            expected = getattr(module, parameter).shape
            if expected != tensor.shape:
                found = tuple(tensor.shape)
                raise ValueError(f"{type(module).__name__}.{parameter}: expected {tuple(expected)}; found {found}")
            setattr(module, parameter, tensor)
        return module.eval()

    def expert(self, e: int) -> tuple[Tensor, Tensor]:
        """gate_up (2I, H) and down (H, I) of one expert in fp32, dequantized."""
        one = slice(e, e + 1)
        scales = [scale.detach()[one] for scale in self.scales] or [None, None]
        gate_up, down = (dequantized(w.detach()[one], s)[0] for w, s in zip((self.gate_up, self.down), scales))
        return gate_up, down

    def truth(self, inputs: Inputs) -> Tensor:
        """The result in fp32, (T, H), by a loop over experts."""
        y = torch.zeros_like(inputs.x, dtype=torch.float32)
        with torch.no_grad():
            for e in inputs.ids.unique().tolist():
                tokens, slots = torch.where(inputs.ids == e)
                gate_up, down = self.expert(e)
                gate, up = (inputs.x[tokens].float() @ gate_up.t()).chunk(2, dim=-1)
                rows = (F.silu(gate) * up) @ down.t()
                y.index_add_(0, tokens, rows * inputs.weights[tokens, slots, None].float())
        return y

    def active_bytes(self, ids: Tensor) -> int:
        """Bytes of the weights and scales of the experts that occur in ``ids``, each expert once."""
        tensors = (self.gate_up, self.down, *self.scales)
        return sum(t.nbytes // t.shape[0] for t in tensors) * ids.unique().numel()


def _random(experts: int, rows: int, columns: int, dtype: str, generator: torch.Generator) -> tuple[Tensor, Any]:
    """Weights with a variance of 1 / columns, and their scales. Quantized one by one, to save memory."""
    device = generator.device
    w = torch.empty(experts, rows, columns, device=device, dtype=torch.bfloat16 if dtype == "bf16" else FP8)
    if dtype == "bf16":
        return w.normal_(std=columns**-0.5, generator=generator), None
    scale = torch.empty(experts, -(-rows // _SIDE), -(-columns // _SIDE), device=device)
    for e in range(experts):
        values = torch.randn(1, rows, columns, device=device, generator=generator) * columns**-0.5
        w[e : e + 1], scale[e : e + 1] = quantized(values)
    return w, scale


def quantized(w: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (E, out, in) as FP8 checkpoints have them: float8_e4m3fn, and a scale for each 128x128 block."""
    return reference.quantize(w, _BLOCKS, Recipe.FP8_BLOCKWISE, FP8)


def dequantized(w: Tensor, scale: Tensor | None) -> Tensor:
    """The values of weights (E, out, in) in fp32."""
    return reference.dequantize(w, scale, _BLOCKS)


@functools.cache
def experts_class(model: str) -> Any:
    """The class of a model's experts in transformers."""
    package = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return next(v for name, v in vars(package).items() if name.endswith("Experts") and hasattr(v, "_apply_gate"))


def fp8_experts(experts: Module, config: Any) -> Module:
    """What transformers puts in the place of ``experts`` in an FP8 model, on the meta device."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    model = Module()
    model.layer = torch.nn.ModuleDict({"experts": experts})
    model.config = config
    return replace_with_fp8_linear(model, quantization_config=FineGrainedFP8Config()).layer["experts"]


def register() -> None:
    """Adds the implementations of this package to transformers' registries.

    Raises:
        ImportError: transformers is not installed, or too old; the message says what to install.
    """
    from grouped_gemm.integrations import transformers as integration

    integration.register()
    integration.register(Recipe.FP8_BLOCKWISE, name=RECIPE)


def offer_deep_gemm() -> None:
    """Hands transformers an installed package ``deep_gemm``, where it cannot load its own build from the Hub."""
    import transformers.integrations.deepgemm as integration
    import transformers.integrations.finegrained_fp8 as fp8

    if integration.is_deepgemm_loadable() or find_spec("deep_gemm") is None:
        return
    with suppress(ImportError, OSError, AttributeError):  # another version: DeepGEMM is left out with its own reason
        import deep_gemm
        from deep_gemm.utils import per_token_cast_to_fp8

        integration._DEEPGEMM = integration.DeepGEMM(
            fp8_fp4_matmul=deep_gemm.fp8_fp4_gemm_nt,
            grouped_fp8_fp4_matmul_nt=deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous,
            grouped_fp8_fp4_matmul_nn=deep_gemm.m_grouped_fp8_fp4_gemm_nn_contiguous,
            grouped_bf16_matmul_nt=deep_gemm.m_grouped_bf16_gemm_nt_contiguous,
            grouped_bf16_matmul_nn=deep_gemm.m_grouped_bf16_gemm_nn_contiguous,
            per_token_cast_to_fp8=per_token_cast_to_fp8,
            transform_sf_into_required_layout=deep_gemm.transform_sf_into_required_layout,
            transform_weights_for_mega_moe=None,
            get_symm_buffer_for_mega_moe=None,
            fp8_fp4_mega_moe=None,
            m_alignment=deep_gemm.get_mk_alignment_for_contiguous_layout(),
        )
        integration.is_deepgemm_loadable = fp8.is_deepgemm_loadable = lambda raise_error=False: True


def is_ours(name: str) -> bool:
    return name in ("grouped_gemm", RECIPE)


def left_out(name: str, dtype: str, mode: str, case: Case, device: str) -> str:
    """Why an implementation is not measured in a mode, or ""."""
    if device != "cuda" and (mode == "graph" or name in ("deepgemm", "sonicmoe")):
        return "it needs a CUDA GPU"
    if name == RECIPE and mode != "eager":
        return "calls that are compiled or captured do not use the weight cache"
    if name == "eager" and mode == "graph":
        return "host syncs cannot be captured"
    if name == "eager" and mode != "eager":
        return "a loop over experts, whose graph breaks at each"
    if (name, dtype) == ("batched_mm", "bf16") and case.copied_bytes > _COPY_LIMIT:
        return f"it would copy {case.copied_bytes / 2**30:.0f} GiB of weights"
    return ""


class Layer(NamedTuple):
    """A module on its inputs. ``call`` runs without gradients."""

    module: Module
    inputs: Inputs
    call: Callable[[], Tensor]


def layer_of(module: Module, inputs: Inputs) -> Layer:
    def call() -> Tensor:
        with torch.no_grad():
            return module(*inputs)

    return Layer(module, inputs, call)


def compiled(layer: Layer, mode: str, **options: Any) -> Layer:
    """The layer under torch.compile."""
    module = torch.compile(layer.module, mode=mode, dynamic=False, **options)

    def call() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return module(*layer.inputs)

    return layer._replace(call=call)


def missing() -> str:
    """Why transformers cannot be used here, or ""."""
    if find_spec("transformers") is None:
        return "expected transformers >= 5.17; found none. Install it: pip install '.[transformers]'"
    try:
        register()
    except ImportError as error:
        return str(error)
    if torch.cuda.is_available():
        offer_deep_gemm()
    return ""
