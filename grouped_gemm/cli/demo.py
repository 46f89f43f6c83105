"""Trains a mixture-of-experts language model in bf16 and in each FP8 recipe, with the same seed and batches.

The model reads the bytes of a made-up language (`cli.language`). A run never sees a text twice, so its training loss is
the loss on unseen text.

Losses are smoothed by a running mean of a thirtieth of the steps, and of at least `WINDOW`. The gap of a run to bf16 is
the relative difference of their smoothed losses; it is taken from the first full window to the last one, and the last
one is the final loss. The tests, and the exit code, demand that final losses are within `LIMIT` of bf16's.

B, S, T: sequences, bytes per sequence, B * S tokens. M: routed rows, one per token and expert that it goes to.
D, H: width of the model, width of an expert. E: experts. Q: attention heads.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouped_gemm import BackendKind, KernelPreference, Recipe, __version__, explain
from grouped_gemm.cli import language
from grouped_gemm.core.machine import default_device, machine_of
from grouped_gemm.moe import Experts
from grouped_gemm.selection.rules import Decision

RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8)  # the first is the baseline
WINDOW = 10  # the fewest steps of the running mean, and of learning rate warmup
LIMIT = 2.0  # the largest allowed difference of FP8 to bf16, in percent
_INK = "#3b3f46"
_COLORS = dict(zip(RECIPES, ("#7d4b9e", "#0072b2", "#d55e00", "#009e73")))  # safe for colour-blind readers (Okabe, Ito)
_STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (8, 2)))  # of backends


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
    learning_rate: float = 1.5e-3

    @property
    def rows(self) -> int:
        """M, the routed rows of a batch."""
        return self.batch * self.sequence * self.experts_per_token


SIZES = {
    "small": Config(),
    "large": Config(
        layers=4, width=512, heads=8, experts=16, hidden=512, sequence=256, batch=32, learning_rate=6e-4
    ),  # for a GPU: 55 million parameters, 8192 tokens a step
}


def window(steps: int) -> int:
    """Steps of the running mean and of learning rate warmup in a run of ``steps`` steps."""
    return max(WINDOW, steps // 30)


@dataclass(frozen=True, eq=False)
class Curve:
    """One training run.

    Attributes:
        recipe: how the experts' operands were quantized.
        preference: the backend that was asked for; AUTO: none.
        losses: (steps,) float32, mean cross-entropy of each batch in nats per byte.
        tokens_per_second: speed from the second step on; the first step includes lazy initialization.
        backends: names of the backends that ran the experts.
    """

    recipe: Recipe
    preference: KernelPreference
    losses: Tensor
    tokens_per_second: float
    backends: tuple[str, ...]

    @property
    def label(self) -> str:
        """As in "fp8_rowwise", or "bf16 on triton" if a backend was asked for."""
        return _label(self.recipe, self.preference)

    @property
    def smoothed(self) -> Tensor:
        """The mean of each `window` of successive losses, (steps - window + 1,); if there are fewer, of all, (1,)."""
        steps = len(self.losses)
        return self.losses.unfold(0, min(window(steps), steps), 1).mean(1)

    @property
    def final(self) -> float:
        """The mean of the last losses, over one `window`."""
        return self.smoothed[-1].item()

    def gap_to(self, other: Curve) -> Tensor:
        """Relative difference between the smoothed losses and those of ``other``, in percent."""
        return 100 * (self.smoothed / other.smoothed - 1)

    def is_close_to(self, other: Curve) -> bool:
        """Whether the final losses differ by at most `LIMIT`. False for NaN."""
        return abs(100 * (self.final / other.final - 1)) <= LIMIT


def _label(recipe: Recipe, preference: KernelPreference) -> str:
    name = recipe.value if recipe.is_scaled else "bf16"
    return name if preference.kind is None else f"{name} on {preference.value}"


def decisions(
    config: Config, recipe: Recipe, preference: KernelPreference, device: torch.device | str
) -> tuple[Decision, ...]:
    """Which backends run the two grouped GEMMs of a layer, forward and backward, or why they refuse."""

    def decision(n: int, k: int) -> Decision:
        x = torch.empty(config.rows, k, dtype=torch.bfloat16, device=device, requires_grad=True)
        weight = torch.empty(config.experts, n, k, dtype=torch.bfloat16, device=device, requires_grad=True)
        offs = torch.zeros(config.experts, dtype=torch.int32, device=device)
        return explain(x, weight.transpose(1, 2), offs, recipe=recipe, kernel_preference=preference).decision

    return decision(2 * config.hidden, config.width), decision(config.width, config.hidden)


class MoE(nn.Module):
    """A router sends each token to its top experts, SwiGLU networks, whose outputs a softmax weights."""

    def __init__(self, config: Config, recipe: Recipe, preference: KernelPreference) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = Experts(config.experts, config.width, config.hidden, recipe=recipe, kernel_preference=preference)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) to (T, D) in bfloat16."""
        scores, topk_ids = self.router(x_TD).topk(self.experts_per_token)
        # Parameters stay in fp32. Autocast casts them to bf16 before grouped_mm quantizes them.
        with torch.autocast(x_TD.device.type, torch.bfloat16):
            y_TD: Tensor = self.experts(x_TD.bfloat16(), topk_ids, scores.softmax(1))
        return y_TD


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

    def __init__(self, config: Config, recipe: Recipe, preference: KernelPreference) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(config.width), Attention(config)
        self.moe_norm, self.moe = nn.RMSNorm(config.width), MoE(config, recipe, preference)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return x_BSD + self.moe(self.moe_norm(x_BSD).flatten(0, 1)).view_as(x_BSD)


def language_model(
    config: Config, recipe: Recipe, preference: KernelPreference = KernelPreference.AUTO
) -> nn.Sequential:
    """A model from bytes (B, S) int64 to the logits of each next byte, (B, S, 256)."""
    embedding = nn.Embedding(256, config.width)
    nn.init.normal_(embedding.weight, std=0.02)  # small, so that context soon dominates the residual stream
    return nn.Sequential(
        embedding,
        *(Block(config, recipe, preference) for _ in range(config.layers)),
        nn.RMSNorm(config.width),
        nn.Linear(config.width, 256, bias=False),
    )


@functools.cache
def texts(config: Config, steps: int, seed: int) -> language.Texts:
    """What a run reads: a text of S + 1 bytes for each sequence of each step, with the last byte as a label only."""
    return language.write(steps * config.batch, config.sequence + 1, seed)


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
    preference: KernelPreference = KernelPreference.AUTO,
    *,
    steps: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    config: Config | None = None,
    progress: bool = True,
) -> Curve:
    """Trains one model. The same ``seed`` gives the same initial weights and batches with any recipe and backend.

    Everything is fp32, including weights, except the experts' operands and what is between them, which are bfloat16.

    Args:
        recipe: how the experts' operands are quantized.
        preference: the backend of the experts.
        steps: the number of batches.
        device: the device to train on.
        seed: the seed of torch's generators and of the texts.
        config: sizes; None: those of the demo.
        progress: whether to show a progress bar on standard error, if that is a terminal.

    Raises:
        NoBackendError: the backend does not run this recipe.
    """
    from tqdm import tqdm

    config, device = config or Config(), torch.device(device)
    read = texts(config, steps, seed).data.to(device).unflatten(0, (steps, config.batch))
    torch.manual_seed(seed)
    model = language_model(config, recipe, preference).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, betas=(0.9, 0.95), fused=True)
    warmup = window(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
    losses = torch.zeros(steps, device=device)
    bar = tqdm(range(steps), desc=f"{_label(recipe, preference):13}", unit="step", disable=None if progress else True)
    for step in bar:
        batch = read[step].long()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
        if step % WINDOW == 0 and not bar.disable:  # reading a loss waits for the device
            bar.set_postfix(loss=f"{loss.item():.2f}")
        if step == 0:
            losses[0].item()  # waits for the device
            start = time.perf_counter()
    losses = losses.cpu()
    speed = (steps - 1) * config.batch * config.sequence / (time.perf_counter() - start)
    names = {backend.value for d in decisions(config, recipe, preference, device) for backend in d.backends}
    return Curve(recipe, preference, losses, speed, tuple(sorted(names)))


def table(curves: Sequence[Curve]) -> str:
    """A table of the curves, and whether the final losses are within the limit of the first one."""
    bf16, *others = curves
    width = max(14, *(len(curve.label) + 1 for curve in curves))
    last = f"last {window(len(bf16.losses))}"
    head = f"{'experts':{width}}{'first loss':>11}{last:>10}{'ratio':>9}{'largest gap':>13}{'tokens/s':>11}  backends"
    lines = [head, "-" * len(head)]
    for curve in curves:
        ratio, gap = f"{curve.final / bf16.final:.4f}", f"{curve.gap_to(bf16).abs().max():.2f}%"
        lines.append(
            f"{curve.label:{width}}{curve.losses[0]:11.3f}{curve.final:10.3f}{'' if curve is bf16 else ratio:>9}"
            f"{'' if curve is bf16 else gap:>13}{curve.tokens_per_second:11,.0f}  {', '.join(curve.backends)}"
        )
    lines += ["", "Loss in nats per byte. The ratio is that of the final losses, and a gap is that of running means."]
    far = [curve.label for curve in others if not curve.is_close_to(bf16)]
    if far:
        lines.append(f"Not within {LIMIT:g}% of {bf16.label} at the end: {', '.join(far)}.")
    elif others:
        lines.append(f"Within {LIMIT:g}% of {bf16.label} at the end: yes, all {len(others)}.")
    return "\n".join(lines)


def draw(curves: Sequence[Curve], read: language.Texts, path: Path) -> None:
    """Writes a chart of the smoothed losses, and of the gaps to the first curve.

    Args:
        curves: with the same number of steps; the first is bf16.
        read: what the models read.
        path: the file; its suffix gives the format, any that matplotlib writes.
    """
    from matplotlib.figure import Figure  # used without pyplot: no display, no global state

    bf16, *others = curves
    steps = len(bf16.losses)
    middle = (steps - len(bf16.smoothed)) / 2 + 1  # a mean is drawn at the middle of its window
    windows = torch.arange(len(bf16.smoothed)) + middle
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(5, 3))

    top.plot(range(1, steps + 1), bf16.losses, color=_INK, alpha=0.3, linewidth=0.8, label=f"{bf16.label}, each step")
    top.plot(windows, bf16.smoothed, color=_INK, alpha=0.3, linewidth=6, label=bf16.label)
    bottom.axhspan(-LIMIT, LIMIT, color=_INK, alpha=0.07, linewidth=0, label=f"limit at the end, {LIMIT:g}%")
    bottom.axhline(0, color=_INK, alpha=0.3, linewidth=3, label=bf16.label)
    preferences = list(dict.fromkeys(curve.preference for curve in curves))
    for curve in others:
        style = _STYLES[preferences.index(curve.preference)]
        color, gap = _COLORS[curve.recipe], curve.gap_to(bf16)
        top.plot(windows, curve.smoothed, color=color, linestyle=style, linewidth=1.3, label=curve.label)
        label = f"{curve.label}, at most {gap.abs().max():.1f}%"
        bottom.plot(windows, gap, color=color, linestyle=style, linewidth=1.3, label=label)
    for loss, dashes, label in (
        (read.unigram_loss, (4, 3), "best guess from byte frequencies alone"),
        (read.least_loss, (1, 2), "no model can be better"),
    ):
        top.axhline(loss, color=_INK, linewidth=1, linestyle=(0, dashes), zorder=0, label=label)

    top.set_title("A mixture-of-experts language model, trained in bf16 and in FP8", loc="left", weight="bold")
    top.set_ylabel(f"training loss, nats per byte\n(mean of {min(window(steps), steps)} steps)")
    top.legend(frameon=False)
    bottom.set(xlabel="training step", ylabel=f"loss relative to {bf16.label}, %", xlim=(1, steps))
    bottom.set_ymargin(0.1)
    columns = 3 if bf16.preference.kind is None else 2  # labels with a backend are long
    bottom.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2, linewidth=0.6)
    figure.savefig(path)


def as_data(curves: Sequence[Curve], read: language.Texts, args: argparse.Namespace, device: torch.device) -> Any:
    """The runs as plain strings, numbers, lists and dicts, ready for JSON. Losses have four decimals."""
    bf16, machine = curves[0], machine_of(device)
    return {
        "gpu" if machine.is_gpu else "device": machine.name,
        "versions": {"grouped_gemm": __version__, **dict(machine.versions)},
        "size": args.size,
        "config": asdict(SIZES[args.size]),
        "steps": args.steps,
        "seed": args.seed,
        "window": window(args.steps),
        "limit_percent": LIMIT,
        "unigram_loss": round(read.unigram_loss, 4),
        "least_loss": round(read.least_loss, 4),
        "curves": [
            {
                "label": curve.label,
                "recipe": curve.recipe.value,
                "backends": list(curve.backends),
                "final_loss": round(curve.final, 4),
                "ratio_to_bf16": round(curve.final / bf16.final, 5),
                "largest_gap_percent": round(curve.gap_to(bf16).abs().max().item(), 3),
                "is_within_limit": curve.is_close_to(bf16),
                "tokens_per_second": round(curve.tokens_per_second),
                "losses": [round(loss, 4) for loss in curve.losses.tolist()],
            }
            for curve in curves
        ],
    }


def run(args: argparse.Namespace) -> int:
    """Trains in every recipe, prints the table and writes the chart.

    Args:
        args: device ("cpu", "cuda" or None), backend (a name, or "all"), recipes, size, steps, seed, output (a path;
            its suffix gives the format of the chart), json (a path or None).

    Returns:
        0; or 1 if a final loss is not within `LIMIT` of bf16's, a package or the GPU is missing, the backend does not
        run bf16, or a file cannot be written.
    """
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"The demo needs {' and '.join(missing)}: pip install grouped-gemm-dispatch[demo]")
    problem = _problem_with(args.output)
    if problem:
        return _fail(f"--output {args.output}: {problem}")
    problem = args.json and _problem_with_file(args.json)
    if problem:
        return _fail(f"--json {args.json}: {problem}")
    if args.device == "cuda" and not torch.cuda.is_available():
        return _fail("--device cuda needs a GPU that torch sees; found none. Omit the option to run on the CPU.")
    device, config = torch.device(args.device) if args.device else default_device(), SIZES[args.size]
    runs, refused = _runs(args, device)
    refusals = "".join(f"Not run: {', '.join(labels)}. {reason}\n" for reason, labels in refused.items())
    if not runs or runs[0][0].is_scaled:
        return _fail(f"{refusals}--backend {args.backend}: expected a backend that trains in bf16 on this machine")
    plural = "s" * (len(runs) > 1)
    print(f"{refusals}{len(runs)} run{plural} of {args.steps} steps on {machine_of(device).name}\n", flush=True)
    curves = [train(*of, steps=args.steps, device=device, seed=args.seed, config=config) for of in runs]
    read = texts(config, args.steps, args.seed)
    print(f"\n{table(curves)}")
    draw(curves, read, args.output)
    print(f"The curves are in {args.output}.")
    if args.json:
        args.json.write_text(json.dumps(as_data(curves, read, args, device)) + "\n", encoding="utf-8")
        print(f"The losses are in {args.json}.")
    return 0 if all(curve.is_close_to(curves[0]) for curve in curves) else 1


def _runs(
    args: argparse.Namespace, device: torch.device
) -> tuple[list[tuple[Recipe, KernelPreference]], dict[str, list[str]]]:
    """Recipes and backends to train, bf16 first; and the labels of those that a backend refuses, by its reason."""
    preferences = (
        [KernelPreference(args.backend)]
        if args.backend != "all"
        else [
            KernelPreference(kind.value)
            for kind in BackendKind
            if device.type == "cpu" or kind is not BackendKind.EMULATED
        ]
    )
    runs, refused = [], dict[str, list[str]]()
    for recipe in args.recipes:
        for preference in preferences:
            found = decisions(SIZES[args.size], recipe, preference, device)
            if all(decision.is_complete for decision in found):
                runs.append((recipe, preference))
            else:
                reason = next(line for decision in found for line in decision.refusal_lines())
                refused.setdefault(reason, []).append(_label(recipe, preference))
    return runs, refused


def _problem_with(output: Path) -> str | None:
    """Why the chart cannot be written to ``output``, checked before training; None if it can."""
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in formats:
        return (
            f"expected a file name with one of the suffixes .{', .'.join(formats)}; found "
            f"{output.suffix or 'no suffix'!r}"
        )
    return _problem_with_file(output)


def _problem_with_file(output: Path) -> str | None:
    """Why a file cannot be written to ``output``; None if it can."""
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
