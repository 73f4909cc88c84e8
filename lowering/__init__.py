"""The ``kbit::`` operators and the registry that picks a kernel for them."""
