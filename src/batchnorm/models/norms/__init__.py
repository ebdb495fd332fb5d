"""The batch normalizations of a model: whose they are, and what is known of each."""
