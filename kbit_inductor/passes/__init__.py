"""Rewrites of the graph that Dynamo captured. Each pass is a plain function that takes the shared context."""
