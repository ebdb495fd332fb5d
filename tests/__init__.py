"""The tests: a mirror of src/batchnorm, and what they share in support/."""
