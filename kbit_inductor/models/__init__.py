"""Models whose weights are packed: quantized in place, saved, loaded, taken over from GGUF."""
