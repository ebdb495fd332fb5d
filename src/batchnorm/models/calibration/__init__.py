"""The parts of `calibrate`, one idea each."""
