"""What ``explain`` finds out, and the ways to show it."""
