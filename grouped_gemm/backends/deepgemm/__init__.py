"""DeepGEMM: backend, package, quantizers and layouts."""
