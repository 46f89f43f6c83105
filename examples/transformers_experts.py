"""A transformers model whose experts run on this package, by `experts_implementation="grouped_gemm"`.

    python examples/transformers_experts.py
    python examples/transformers_experts.py --model Qwen/Qwen3-30B-A3B --recipe fp8_blockwise

Without --model, it is a Qwen3-MoE with random weights, which needs no network: a tiny one on a CPU, and on a GPU two
layers with the sizes of Qwen3-30B-A3B. It needs transformers >= 5.17.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from grouped_gemm.integrations.transformers import register


def random_model(is_tiny: bool) -> Any:
    """A Qwen3-MoE of two layers, in bf16."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
    }
    if not is_tiny:
        sizes = {
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        }
    config = Qwen3MoeConfig(vocab_size=256, num_hidden_layers=2, eos_token_id=None, **sizes)
    return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)


def main() -> None:
    """Compares logits with transformers' own experts, and generates a few tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint, on the Hub or in a directory")
    parser.add_argument("--recipe", default=None, help="how operands are quantized; default: not at all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    register(args.recipe)  # before the name is used
    torch.manual_seed(0)
    if args.model is None:
        with torch.device(args.device):
            model = random_model(is_tiny=args.device == "cpu").eval()
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map=args.device)
    ids = torch.randint(3, model.config.vocab_size, (1, 16), device=args.device)

    with torch.no_grad():
        model.set_experts_implementation("grouped_mm")
        theirs = model(ids).logits.float()
        model.set_experts_implementation("grouped_gemm")  # or from_pretrained(..., experts_implementation=...)
        ours = model(ids).logits.float()
        print(f"relative difference of logits: {((ours - theirs).norm() / theirs.norm()).item():.4f}")
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    print(f"generated: {tokens[0, ids.shape[1] :].tolist()}")


if __name__ == "__main__":
    main()
