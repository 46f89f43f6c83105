"""The layers that experts.py compares: those of this package, and what a user would call instead.

T, k, E, H, I: tokens, experts per token, experts, hidden and intermediate features.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from grouped_gemm import Recipe, register_weight_cache
from grouped_gemm.moe import Experts

ZIPF = 1.2  # the exponent: the expert of rank r gets tokens in proportion to r^-1.2
ROUTINGS = ("random", "balanced", "zipf")
LOOPS = ("eager", "eager_fused")  # loops over experts, with host syncs
IMPLEMENTATIONS = (*LOOPS, "batched_mm", "grouped_mm")
PEERS = ("torch", "transformers grouped_mm", "transformers batched_mm", "transformers eager", "sonic")
_COPY_LIMIT = 4 * 2**30  # bytes of weights that batched_mm may copy


class Case(NamedTuple):
    """Sizes of a layer."""

    experts: int
    hidden: int
    intermediate: int
    k: int
    tokens: int

    @property
    def flops(self) -> int:
        """Of the GEMMs of one forward call; forward and backward have three times as many."""
        return 6 * self.tokens * self.k * self.hidden * self.intermediate

    @property
    def copied_bytes(self) -> int:
        """Of bf16 weights that are copied for each routed row."""
        return 6 * self.tokens * self.k * self.hidden * self.intermediate


class Variant(NamedTuple):
    """How a layer of ours computes.

    Attributes:
        recipe: of the GEMMs.
        weights: "inside": quantized by each call; "once": by the first call, kept by `register_weight_cache`; "" where
            the recipe quantizes nothing.
        keep: the argument of `Experts` that says what is kept for backward; "": left to its default.
    """

    recipe: Recipe
    weights: str = ""
    keep: str = ""

    @property
    def label(self) -> str:
        """bf16; fp8_blockwise once; fp8_blockwise once keep=recipe."""
        name = self.recipe.value if self.recipe.is_scaled else "bf16"
        return " ".join(filter(None, (name, self.weights, self.keep and f"keep={self.keep}")))


BF16 = Variant(Recipe.NONE)


def variants(recipe: Recipe) -> tuple[Variant, ...]:
    """All variants of a recipe, also those that `missing_argument` refuses."""
    if not recipe.is_scaled:
        return (Variant(recipe),)
    return Variant(recipe, "inside"), Variant(recipe, "once"), Variant(recipe, "once", "recipe")


def missing_argument(variant: Variant) -> str:
    """Why this version of `Experts` cannot run the variant, or ""."""
    has_keep = "keep" in inspect.signature(Experts).parameters
    return "" if has_keep or not variant.keep else "Experts has no argument keep"


class Layer(NamedTuple):
    """A layer on fixed operands.

    Attributes:
        forward: returns (T, H).
        leaves: what a training step differentiates in.
        module: what torch.compile compiles; None for a peer.
        inputs: the arguments of ``module``.
        interleaved: whether gate and up rows alternate in the weights, as the layer reads them.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    module: torch.nn.Module | None = None
    inputs: tuple[Tensor, ...] = ()
    interleaved: bool = False


class Operands:
    """Random operands of a case in bf16, which all its layers share. Use it as a context: it owns a weight cache.

    Attributes:
        x: (T, H), a leaf.
        weights: topk_weights, (T, k), fp32, a leaf.
        ids: topk_ids (T, k) by routing.
        gate_up: (E, 2I, H).
        down: (E, H, I).
        dy: (T, H), the gradient of the output.
    """

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        num_experts, hidden, inner, k, tokens = case
        self.gate_up = Parameter(normal(num_experts, 2 * inner, hidden).mul_(0.02))
        self.down = Parameter(normal(num_experts, hidden, inner).mul_(0.02))
        self.x, self.dy = normal(tokens, hidden).requires_grad_(), normal(tokens, hidden)
        self.weights = torch.rand(tokens, k, device=device).softmax(-1).requires_grad_()
        self.ids = {routing: topk_ids(case, routing).to(device) for routing in ROUTINGS}
        # Other tensors in the same memory, since the cache holds for all calls with the parameters of its optimizer.
        self.cached = Parameter(self.gate_up.detach()), Parameter(self.down.detach())
        self._optimizer = torch.optim.SGD(self.cached, lr=0.0)  # never stepped
        self.cache = register_weight_cache(self._optimizer)

    def __enter__(self) -> Operands:
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.remove()

    def ours(self, implementation: str, variant: Variant, routing: str, interleaved: bool = False) -> Layer:
        """A layer of this package."""
        options: dict[str, Any] = {"recipe": variant.recipe, "implementation": implementation}
        if variant.keep:
            options["keep"] = variant.keep
        num_experts, hidden, inner, *_ = self.case
        module = Experts(num_experts, hidden, inner, interleaved=interleaved, device="meta", **options)
        once = variant.weights == "once"
        module.gate_up, module.down = self.cached if once else (self.gate_up, self.down)
        inputs = self.x, self.ids[routing], self.weights
        leaves = self.x, self.weights, module.gate_up, module.down
        return Layer(lambda: module(*inputs), leaves, module, inputs, interleaved)

    def peer(self, name: str, routing: str) -> Layer:
        """What a user would call instead.

        Raises:
            ImportError and others: it cannot run; the message says why.
        """
        if name == "torch":
            return self._torch(self.ids[routing])
        if name == "sonic":
            return self._sonic(self.ids[routing])
        return self._transformers(self.ids[routing], name.removeprefix("transformers "))

    def _torch(self, ids: Tensor) -> Layer:
        """What a user writes on torch's grouped GEMM: sort, gather, two products, gate, weigh, add up."""

        def mm(rows: Tensor, w: Tensor, offs: Tensor) -> Tensor:
            return torch._grouped_mm(rows, w.transpose(1, 2), offs=offs)

        def forward() -> Tensor:
            flat, k = ids.flatten(), ids.shape[1]
            order = flat.argsort(stable=True)
            offs = torch.bincount(flat, minlength=self.case.experts).cumsum(0).to(torch.int32)
            gate, up = mm(self.x[order // k], self.gate_up, offs).chunk(2, -1)
            y = mm(F.silu(gate) * up, self.down, offs) * self.weights.to(self.x.dtype).flatten()[order].unsqueeze(1)
            back = torch.index_copy(torch.empty_like(y), 0, order, y)
            return back.view(*ids.shape, -1).sum(1)

        return Layer(forward, (self.x, self.weights, self.gate_up, self.down))

    def _sonic(self, ids: Tensor) -> Layer:
        """SonicMoE with its default tiles: to find others it takes minutes for each shape."""
        _use_default_tiles()
        from sonicmoe import moe_general_routing_inputs
        from sonicmoe.enums import ActivationType

        gate_up, down = (w.detach().permute(1, 2, 0).requires_grad_() for w in (self.gate_up, self.down))

        def forward() -> Tensor:
            num_tokens, k = ids.shape
            tokens = torch.arange(num_tokens, device=self.device, dtype=torch.int32).repeat_interleave(k)
            stream = torch.cuda.current_stream().cuda_stream
            out, _ = moe_general_routing_inputs(
                self.x, self.weights.flatten(), tokens, ids.flatten().int(), gate_up, None, down, None,
                self.case.experts, stream, ActivationType.SWIGLU, not torch.is_grad_enabled(),
            )  # fmt: skip
            return out

        return Layer(forward, (self.x, self.weights, gate_up, down), interleaved=True)

    def _transformers(self, ids: Tensor, implementation: str) -> Layer:
        """The experts of Qwen3-MoE in transformers."""
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        num_experts, hidden, inner, k, _ = self.case
        config = Qwen3MoeConfig(
            num_experts=num_experts,
            hidden_size=hidden,
            moe_intermediate_size=inner,
            num_experts_per_tok=k,
            hidden_act="silu",
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        shapes = tuple(module.gate_up_proj.shape), tuple(module.down_proj.shape)
        if shapes != (tuple(self.gate_up.shape), tuple(self.down.shape)):
            raise ValueError(f"expected weights (E, 2I, H) and (E, H, I) in Qwen3MoeExperts; found {shapes}")
        module.gate_up_proj, module.down_proj = self.gate_up, self.down
        inputs = self.x, ids, self.weights
        return Layer(lambda: module(*inputs), (self.x, self.weights, self.gate_up, self.down))


@functools.cache
def _use_default_tiles() -> None:
    """Makes SonicMoE's GEMMs take their default tiles."""
    import sonicmoe.functional as package
    from sonicmoe.functional import backward, forward

    for module in (package, forward, backward):
        for name in ("gemm", "gemm_gated", "gemm_dgated"):
            function = getattr(module, name, None)
            if function is not None and not isinstance(function, functools.partial):
                setattr(module, name, functools.partial(function, tuned=False))


def topk_ids(case: Case, routing: str) -> Tensor:
    """(T, k) int64 on the CPU; the experts of a token are distinct."""
    generator = torch.Generator().manual_seed(0)
    if routing == "balanced":
        tokens = torch.randperm(case.tokens, generator=generator)
        return (tokens[:, None] * case.k + torch.arange(case.k)) % case.experts
    noise = torch.rand(case.tokens, case.experts, generator=generator)
    if routing == "zipf":  # k of E without replacement: the largest of logits with Gumbel noise
        ranks = torch.randperm(case.experts, generator=generator) + 1.0
        noise = -ZIPF * ranks.log() - (-noise.log()).log()
    return noise.topk(case.k, dim=-1).indices


def missing_peer(name: str, device: str) -> str:
    """Why a peer cannot run here, or ""."""
    package = {"torch": "torch", "sonic": "sonicmoe"}.get(name, "transformers")
    if find_spec(package) is None:
        return f"{package} is not installed"
    return "it needs a CUDA GPU" if name == "sonic" and device != "cuda" else ""


def left_out(name: str, case: Case, variant: Variant, mode: str) -> str:
    """Why a layer is not measured in a mode, or ""."""
    compiled = mode not in ("eager", "graph")
    is_loop = name in (*LOOPS, "transformers eager")
    if name in PEERS and compiled:
        return "peers are not compiled"
    if is_loop and mode == "graph":
        return "host syncs cannot be captured"
    if is_loop and compiled and case.experts > 8:
        return f"a loop over {case.experts} experts, whose graph breaks at each"
    if name == "transformers eager" and case.experts > 8:
        return "the loop over experts is measured as eager"
    if name.endswith("batched_mm") and case.copied_bytes > _COPY_LIMIT:
        return f"it would copy {case.copied_bytes / 2**30:.0f} GiB of weights"
    if variant.weights == "once" and mode != "eager":
        return "calls that are compiled or captured do not use the weight cache"
    return missing_argument(variant)
