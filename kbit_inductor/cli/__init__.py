"""The command ``kbit``."""
