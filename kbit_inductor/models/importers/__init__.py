"""Readers of other projects' packed weights: one file for each format, and :mod:`.coded`, which all of them end in."""
