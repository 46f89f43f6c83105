"""hipBLASLt: backend, quantizers and layouts."""
