"""What becomes of a model's weights: which there are and how they come about, their packed forms, and how floats go and return."""
