"""Trains a mixture-of-experts language model in bf16 and in each FP8 recipe, with the same seed and batches.

The model reads bytes: the source of Python's standard library, which every machine has. A run sees a small part of it,
hardly anything twice, so its training loss is close to the loss on unseen text.

The gap between FP8 and bf16 is the relative difference of their losses, each smoothed by a running mean of `WINDOW`
steps. It is taken from the first full window to the last one.

B, S, T: sequences, bytes per sequence, B * S tokens. M: routed rows, one per token and expert that it goes to.
D, H: width of the model, width of an expert. E: experts. Q: attention heads.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouped_gemm import Recipe, explain, grouped_mm
from grouped_gemm.core.machine import default_device, machine_of

RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8)  # the first is the baseline
WINDOW = 10  # steps of the running mean
LIMIT = 2.0  # the largest allowed gap of FP8 to bf16, in percent
_WARM_UP = 10  # steps of learning rate warmup, followed by decay to zero
_COLORS = ("#3b3f46", "#0072b2", "#d55e00", "#009e73")  # of RECIPES, safe for colour-blind readers (Okabe, Ito)


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of a batch."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    experts: int = 8
    experts_per_token: int = 2
    hidden: int = 128
    sequence: int = 128
    batch: int = 8
    learning_rate: float = 3e-3


@dataclass(frozen=True, eq=False)
class Curve:
    """One training run.

    Attributes:
        recipe: how the experts' operands were quantized.
        losses: (steps,) float32, mean cross-entropy of each batch in nats per byte.
        tokens_per_second: speed from the second step on; the first step includes lazy initialization.
        backends: names of the backends that ran the experts.
    """

    recipe: Recipe
    losses: Tensor
    tokens_per_second: float
    backends: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name of the recipe; "bf16" without one."""
        return self.recipe.value if self.recipe.is_scaled else "bf16"

    @property
    def smoothed(self) -> Tensor:
        """The mean of each `WINDOW` successive losses, (steps - WINDOW + 1,); if there are fewer, of all, (1,)."""
        return self.losses.unfold(0, min(WINDOW, len(self.losses)), 1).mean(1)

    def gap_to(self, other: Curve) -> Tensor:
        """Relative difference between the smoothed losses and those of ``other``, in percent."""
        return 100 * (self.smoothed / other.smoothed - 1)


class Experts(nn.Module):
    """E SwiGLU networks. A row goes through the network of its group."""

    def __init__(self, config: Config, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        # As in nn.Linear, weights are (out, in). Gate and up projection are one matrix, so one call runs both.
        self.gate_up = nn.Parameter(_normal(config.experts, 2 * config.hidden, config.width))
        self.down = nn.Parameter(_normal(config.experts, config.width, config.hidden))

    def forward(self, x_MD: Tensor, offs: Tensor) -> Tensor:
        """(M, D) in bfloat16, from rows (M, D) sorted by expert and the end row of each expert's group, (E,) int32."""
        gate_MH, up_MH = self._grouped_mm(x_MD, self.gate_up, offs).chunk(2, dim=1)
        return self._grouped_mm(F.silu(gate_MH) * up_MH, self.down, offs)

    def _grouped_mm(self, x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        return grouped_mm(x.bfloat16(), weight.bfloat16().transpose(1, 2), offs, recipe=self.recipe)

    def backends(self, num_rows: int) -> set[str]:
        """The backends that run both calls on M rows, forward and backward."""
        names: set[str] = set()
        for weight in (self.gate_up.bfloat16(), self.down.bfloat16()):
            x = weight.new_empty(num_rows, weight.shape[2], requires_grad=True)
            offs = weight.new_zeros(weight.shape[0], dtype=torch.int32)
            decision = explain(x, weight.transpose(1, 2), offs, recipe=self.recipe).decision
            names |= {backend.value for backend in decision.backends}
        return names


class MoE(nn.Module):
    """A router sends each token to its top experts, and adds up their outputs, weighted by a softmax."""

    def __init__(self, config: Config, recipe: Recipe) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = Experts(config, recipe)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        scores, experts = self.router(x_TD).topk(self.experts_per_token)
        expert_M, order_M = experts.flatten().sort(stable=True)
        token_M = order_M // self.experts_per_token
        every_expert = torch.arange(self.router.out_features, device=x_TD.device)
        offs = torch.searchsorted(expert_M, every_expert, right=True, out_int32=True)
        y_MD = self.experts(x_TD.index_select(0, token_M), offs)
        weight_M = scores.softmax(1).flatten()[order_M]
        return torch.zeros_like(x_TD).index_add(0, token_M, y_MD * weight_M[:, None])


class Attention(nn.Module):
    """Causal attention. A bias that decreases with distance encodes positions (ALiBi, arXiv:2108.12409)."""

    bias_QSS: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        position = torch.arange(config.sequence)
        distance_SS = position[:, None] - position
        slope_Q = 4.0 ** (1 - torch.arange(config.heads))  # from heads that see recent bytes to heads that see all
        bias_QSS = (-slope_Q[:, None, None] * distance_SS).masked_fill(distance_SS < 0, -math.inf)
        self.register_buffer("bias_QSS", bias_QSS)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        heads = (len(self.bias_QSS), -1)
        q, k, v = (part.unflatten(2, heads).transpose(1, 2) for part in self.qkv(x_BSD).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias_QSS)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and experts, each applied to the normalized residual stream."""

    def __init__(self, config: Config, recipe: Recipe) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(config.width), Attention(config)
        self.moe_norm, self.moe = nn.RMSNorm(config.width), MoE(config, recipe)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return x_BSD + self.moe(self.moe_norm(x_BSD).flatten(0, 1)).view_as(x_BSD)


def language_model(config: Config, recipe: Recipe) -> nn.Sequential:
    """A model from bytes (B, S) int64 to the logits of each next byte, (B, S, 256)."""
    embedding = nn.Embedding(256, config.width)
    nn.init.normal_(embedding.weight, std=0.02)  # small, so that context soon dominates the residual stream
    return nn.Sequential(
        embedding,
        *(Block(config, recipe) for _ in range(config.layers)),
        nn.RMSNorm(config.width),
        nn.Linear(config.width, 256, bias=False),
    )


def _normal(*shape: int) -> Tensor:
    """Random weights (..., in) that preserve the variance of their input."""
    return torch.randn(shape) / math.sqrt(shape[-1])


@functools.cache
def corpus() -> Tensor:
    """The source of the standard library's top-level modules, concatenated: (bytes,) uint8."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def unigram_entropy() -> float:
    """The lowest loss of a model without context, in nats per byte of the corpus."""
    frequencies = corpus().bincount() / len(corpus())
    return torch.special.entr(frequencies).sum().item()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Uses one CPU thread: on small tensors, threads cost more than they save, and far more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def train(
    recipe: Recipe,
    *,
    steps: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    config: Config | None = None,
    progress: bool = True,
) -> Curve:
    """Trains one model. The same ``seed`` gives the same initial weights and batches with any recipe.

    Everything is fp32, including weights, except the operands of `grouped_mm`, which are bfloat16.

    Args:
        recipe: how the experts' operands are quantized.
        steps: the number of batches.
        device: the device to train on.
        seed: the seed of torch's generators.
        config: sizes; None: those of the demo.
        progress: whether to show a progress bar on standard error, if that is a terminal.
    """
    from tqdm import tqdm

    config, device, text = config or Config(), torch.device(device), corpus()
    torch.manual_seed(seed)
    model = language_model(config, recipe).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / _WARM_UP, 1 - step / steps))
    window = torch.arange(config.sequence + 1)
    losses: list[float] = []
    bar = tqdm(range(steps), desc=f"{recipe.value:13}", unit="step", disable=None if progress else True)
    for step in bar:
        starts = torch.randint(len(text) - config.sequence, (config.batch, 1))
        batch = text[starts + window].to(device, torch.int64)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.2f}")
        if step == 0:
            start = time.perf_counter()
    tokens = config.batch * config.sequence
    speed = (steps - 1) * tokens / (time.perf_counter() - start)
    moes = (module for module in model.modules() if isinstance(module, MoE))
    names = set[str]().union(*(moe.experts.backends(tokens * moe.experts_per_token) for moe in moes))
    return Curve(recipe, torch.tensor(losses), speed, tuple(sorted(names)))


def table(curves: Sequence[Curve]) -> str:
    """A table of the curves. Gaps are to the first one."""
    head = f"{'experts':14}{'first loss':>11}{f'last {WINDOW}':>9}{'largest gap':>13}{'tokens/s':>10}  backends"
    lines = [head, "-" * len(head)]
    for curve in curves:
        gap = "" if curve is curves[0] else f"{curve.gap_to(curves[0]).abs().max():.2f}%"
        lines.append(
            f"{curve.label:14}{curve.losses[0]:11.3f}{curve.smoothed[-1]:9.3f}{gap:>13}"
            f"{curve.tokens_per_second:10,.0f}  {', '.join(curve.backends)}"
        )
    lines.append(f"\nLoss in nats per byte. A model without context cannot be below {unigram_entropy():.3f}.")
    return "\n".join(lines)


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Writes a chart of the smoothed losses, and of the gaps to the first curve.

    Args:
        curves: with the same number of steps; the first is bf16.
        path: the file; its suffix gives the format, any that matplotlib writes.
    """
    from matplotlib.figure import Figure  # used without pyplot: no display, no global state

    bf16, *others = curves
    steps = len(bf16.losses)
    middle = (steps - len(bf16.smoothed)) / 2 + 1  # a mean is drawn at the middle of its window
    windows = torch.arange(len(bf16.smoothed)) + middle
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))

    ink = _COLORS[0]
    top.plot(range(1, steps + 1), bf16.losses, color=ink, alpha=0.3, linewidth=0.8, label="bf16, each step")
    top.plot(windows, bf16.smoothed, color=ink, alpha=0.3, linewidth=6, label="bf16")
    bottom.axhspan(-LIMIT, LIMIT, color=ink, alpha=0.07, linewidth=0, label=f"limit of the tests, {LIMIT:g}%")
    bottom.axhline(0, color=ink, alpha=0.3, linewidth=3, label="bf16")
    for curve, color in zip(others, _COLORS[1:]):
        gap = curve.gap_to(bf16)
        top.plot(windows, curve.smoothed, color=color, linewidth=1.3, label=curve.label)
        bottom.plot(windows, gap, color=color, linewidth=1.3, label=f"{curve.label}, at most {gap.abs().max():.1f}%")
    top.axhline(
        unigram_entropy(),
        color=ink,
        linewidth=1,
        linestyle=(0, (4, 3)),
        zorder=0,
        label="best guess from byte frequencies alone",
    )

    top.set_title("A mixture-of-experts language model trains in FP8 as well as in bf16", loc="left", weight="bold")
    top.set_ylabel(f"training loss, nats per byte\n(mean of {WINDOW} steps)")
    top.legend(frameon=False)
    bottom.set(xlabel="training step", ylabel="loss relative to bf16, %", xlim=(1, steps))
    bottom.set_ymargin(0.1)
    bottom.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, linewidth=0.6)
    figure.savefig(path)


def run(args: argparse.Namespace) -> int:
    """Trains in every recipe, prints the table and writes the chart.

    Args:
        args: device ("cpu", "cuda" or None), steps, seed, output (a path; its suffix gives the format of the chart).

    Returns:
        0; or 1 if a package, the GPU or the standard library's source is missing, or ``output`` cannot be written.
    """
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"The demo needs {' and '.join(missing)}: pip install grouped-gemm-dispatch[demo]")
    problem = _problem_with(args.output)
    if problem:
        return _fail(f"--output {args.output}: {problem}")
    if args.device == "cuda" and not torch.cuda.is_available():
        return _fail("--device cuda needs a GPU that torch sees; found none. Omit the option to run on the CPU.")
    if not len(corpus()):
        return _fail("The demo needs the source files of Python's standard library; this Python does not have them.")
    device = torch.device(args.device) if args.device else default_device()
    print(f"{len(RECIPES)} runs of {args.steps} steps on {machine_of(device).name}\n", flush=True)
    curves = [train(recipe, steps=args.steps, device=device, seed=args.seed) for recipe in RECIPES]
    print(f"\n{table(curves)}")
    draw(curves, args.output)
    print(f"The curves are in {args.output}.")
    return 0


def _problem_with(output: Path) -> str | None:
    """Why the chart cannot be written to ``output``, checked before training; None if it can."""
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in formats:
        return (
            f"expected a file name with one of the suffixes .{', .'.join(formats)}; found "
            f"{output.suffix or 'no suffix'!r}"
        )
    if not output.parent.is_dir():
        return f"expected an existing directory; found no {output.parent}"
    existed = output.exists()
    try:
        output.open("ab").close()
        if not existed:
            output.resolve().unlink()  # if ``output`` is a link, removes the new file, not the link
    except OSError as error:
        return f"expected a writable file; found: {error.strerror}"
    return None


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1
