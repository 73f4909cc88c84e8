"""What a graph computes before and after a pass, and which pass and layer break a model."""

from __future__ import annotations
