"""`make mutants`: small mistakes made in the code by rule, and which test of the suite catches each.

    python -m tests.mutants --room masks --count 3

Public mutation testers do not serve here. mutmut (3.8) puts all mutants of a function into the file and calls
one of them through a wrapper, which neither Numba nor Triton can compile: they read a function's source.
cosmic-ray (8.7) makes one change at a time in the file, which they can. But it has no rule that drops a term,
a check or a statement, or swaps two operands; it changes annotations too; it does not say which test failed;
and it brings some twenty packages, a database and a web client among them.

The rules are in rules.py, which tests test which part of the code in rooms.py, which mutants are tried in
sample.py, the trial of one in trial.py, the figures in report.py.
"""
