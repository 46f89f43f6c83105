"""What everything else rests on: machine, recipes, problem, preference, quantized operands, torch ops, files."""
