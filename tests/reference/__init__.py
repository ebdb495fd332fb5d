"""Tests of the reference mathematics against oracles from elsewhere."""
