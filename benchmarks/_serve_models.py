"""Whole models of a few layers in their real dimensions, randomly initialised: `generate`, and a training step.

The models of all implementations share their parameters. In FP8 only the experts are: transformers' linear layers in
FP8 need kernels from the Hub, and would be the same for all implementations.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from _common import relative_error
from _experts_layers import topk_ids
from _serve_group import checked
from _serve_layers import RECIPE, Shape, dequantized, experts_class, fp8_experts, quantized
from torch import Tensor
from torch.nn import Module, Parameter

from grouped_gemm import cache_weights

VOCABULARY = 1024
MODES = ("eager", "static")  # the cache of generate; static: compiled on a GPU
ATTENTION = {
    "qwen2_moe": {"num_attention_heads": 16, "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "norm_topk_prob": True},
}
TINY_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "norm_topk_prob": True}
_CLASSES = {"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}


class Models:
    """A model of a shape in one dtype, by implementation, and the same in fp32 with transformers' loop over experts."""

    def __init__(self, shape: Shape, layers: int, dtype: str, device: str) -> None:
        import transformers

        self.shape, self.layers, self.dtype, self.device = shape, layers, dtype, device
        attention = ATTENTION[shape.model] if device == "cuda" else TINY_ATTENTION
        options = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1, "intermediate_size": 2 * shape.hidden}
        config = shape.config(vocab_size=VOCABULARY, num_hidden_layers=layers, **attention, **options)
        torch.manual_seed(0)
        with torch.device(device):
            self._model = getattr(transformers, _CLASSES[shape.model])._from_config(
                config, dtype=torch.bfloat16, experts_implementation="eager"
            )
        self._model.eval()
        for layer in self._model.model.layers:
            with torch.no_grad():
                layer.mlp.gate.weight.normal_(std=shape.hidden**-0.5)
                for w in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                    w.normal_(std=w.shape[2] ** -0.5)
            if dtype == "fp8":
                layer.mlp.experts = _in_fp8(layer.mlp.experts)

    def named(self, implementation: str) -> Any:
        """The model with an implementation of experts. Its parameters are those of the others."""
        model = copy.deepcopy(self._model, {id(p): p for p in self._model.parameters()})
        model.set_experts_implementation(implementation)
        return model

    def in_fp32(self) -> Any:
        """A copy in fp32, with dequantized experts, and transformers' loop over them."""
        shared = {id(p): p for layer in self._model.model.layers for p in layer.mlp.experts.parameters()}
        model = copy.deepcopy(self._model, shared)
        for layer in model.model.layers:
            layer.mlp.experts = _in_fp32(layer.mlp.experts, self.shape)
        model.float().set_experts_implementation("eager")
        return model

    def prompt(self, batch: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randint(3, VOCABULARY, (batch, tokens), generator=generator).to(self.device)


def _in_fp8(experts: Any) -> Module:
    """transformers' FP8 experts with the weights of ``experts``, quantized."""
    tensors = {}
    for name in ("gate_up_proj", "down_proj"):
        w = getattr(experts, name).detach()
        parts = [quantized(w[e : e + 1]) for e in range(len(w))]
        tensors[name], tensors[f"{name}_scale_inv"] = (torch.cat(part) for part in zip(*parts))
    with torch.device("meta"):
        module = fp8_experts(type(experts)(experts.config), experts.config)
    for name, tensor in tensors.items():
        setattr(module, name, Parameter(tensor, requires_grad=False))
    return module


def _in_fp32(experts: Any, shape: Shape) -> Module:
    with torch.device("meta"):
        module = experts_class(shape.model)(experts.config)
    for name in ("gate_up_proj", "down_proj"):
        values = dequantized(getattr(experts, name).detach(), getattr(experts, f"{name}_scale_inv", None))
        setattr(module, name, Parameter(values))
    return module


def generator_of(model: Any, prompt: Tensor, new: int, mode: str) -> Callable[..., Any]:
    """A call of `generate`: greedy, ``new`` tokens for each prompt."""
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(prompt)}
    if mode == "static":
        options["cache_implementation"] = "static"

    return functools.partial(model.generate, prompt, **options)


def generated_error(truth: Any, output: Any, prompt: int) -> float:
    """The median of the relative errors of the logits of generated tokens.

    It is the median, since rounding changes the experts of a few tokens, whose logits then differ. The model in fp32
    reads the tokens that were generated.

    Args:
        truth: the model in fp32.
        output: of generate, with its logits.
        prompt: the number of tokens of each prompt.
    """
    with torch.no_grad():
        expected = truth(output.sequences).logits[:, prompt - 1 : -1].transpose(0, 1)  # (new, batch, vocabulary)
    found = torch.stack(output.logits).float()
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


def step_of(model: Any, name: str, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A training step of the layers: the output, the gradient of x (B, S, H), and those of all parameters.

    Weights are quantized once per step.
    """
    stack = model.model
    leaves = [x, *(p for p in stack.parameters() if p is not stack.embed_tokens.weight)]

    def step() -> tuple[Tensor, ...]:
        with cache_weights() if name == RECIPE else nullcontext():
            y = stack(inputs_embeds=x, use_cache=False).last_hidden_state
            return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    return step


def check_step(
    found: tuple[Tensor, ...], truth: tuple[Tensor, ...], limit: float, peer: Sequence[float] | None = None
) -> list[float]:
    """The relative errors of the output and of all gradients.

    Args:
        found: from `step_of`.
        truth: the same in fp32.
        limit: of the output; a gradient may have twice as much.
        peer: the errors of transformers' loop in bf16; 1.5 times as much is allowed as well, where terms cancel.

    Raises:
        WrongResult: an error is too large.
    """
    errors = [relative_error(one, other.to(one.device)) for one, other in zip(found, truth)]
    for i, error in enumerate(errors):
        checked(error, max(limit * (2 if i else 1), 1.5 * peer[i] if peer else 0.0))
    return errors


@contextmanager
def fixed_routing(model: Any, shape: Shape) -> Iterator[None]:
    """Inside, each router picks experts at random, always the same ones; their weights are those of its logits.

    Otherwise rounding decides which experts some tokens get, and results cannot be compared.
    """

    def hook(gate: Any, _: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, scores, ids = output
        fixed = topk_ids(shape.case(len(ids)), "random").to(ids.device)
        weights = logits.float().softmax(-1).gather(1, fixed)
        weights = weights / weights.sum(-1, keepdim=True) if gate.norm_topk_prob else weights
        return logits, weights.to(scores.dtype), fixed

    handles = [layer.mlp.gate.register_forward_hook(hook) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
