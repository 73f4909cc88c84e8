"""Triton kernels for GPUs; importing this package needs no Triton, importing a module of it does."""
