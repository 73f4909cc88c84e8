"""Bits for each layer: what they cost, the best choice under a budget, and the plan that comes of it."""

from __future__ import annotations

from kbit_inductor.bits.plan import Plan, PlannedLayer
from kbit_inductor.bits.planner import plan

__all__ = ["Plan", "PlannedLayer", "plan"]
