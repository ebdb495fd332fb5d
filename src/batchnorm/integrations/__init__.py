"""Callbacks for libraries that train torch models: a file for each, which alone imports its library."""
