"""The foundations: machine, recipes, call spec, preference, quantized operands, torch ops, files."""
