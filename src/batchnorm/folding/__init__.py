"""The part of folding that knows no framework: the plan, its reasons and its table."""
