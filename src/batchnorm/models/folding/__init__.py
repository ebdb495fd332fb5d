"""The parts of `fold`: which layers take a norm into their weights, and the arithmetic."""
