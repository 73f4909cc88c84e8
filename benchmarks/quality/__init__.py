"""Quality against total bits: models with rounded weights, ours and those of other libraries, measured alike."""
