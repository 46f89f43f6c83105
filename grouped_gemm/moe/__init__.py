"""The layers of a mixture of experts (MoE) around `grouped_mm`."""
