"""The flow of values in a model's forward: which call makes each, and which calls read it."""
