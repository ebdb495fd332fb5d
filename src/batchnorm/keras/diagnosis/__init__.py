"""Gathers what the doctor looks at in a Keras model: its state, its graph, and what its norms receive."""
