"""torch's own kernels: backend, quantizers and layouts."""
