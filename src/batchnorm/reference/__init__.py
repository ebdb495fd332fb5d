"""The mathematics of batch normalization in NumPy float64: readable, slow, derived in its docstrings."""
