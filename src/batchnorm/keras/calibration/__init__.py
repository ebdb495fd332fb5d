"""The parts of `keras.calibrate`."""
