"""The fastest of a short list of configurations, measured once and remembered."""
