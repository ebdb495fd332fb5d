"""The parts of `keras.fold`."""
