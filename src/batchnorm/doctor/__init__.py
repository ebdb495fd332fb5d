"""Judges what is known of the batch normalizations of a model, free of any framework."""
