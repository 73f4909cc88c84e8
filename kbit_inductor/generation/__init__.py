"""Text from a causal language model: a static cache, two graphs, no guards per token."""
