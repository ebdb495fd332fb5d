"""Verbs on whole models."""
