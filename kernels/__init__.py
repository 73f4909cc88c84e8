"""Device code of the ``kbit::`` operators and the storage layout they read.

A kernel knows packed operands and activations. It knows nothing of FX graphs, quantizers or options.
"""
