"""Gathers what the doctor looks at in a torch model: its state, its flow, and what its norms receive."""
