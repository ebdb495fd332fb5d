"""One grid of cases, one table of tolerances, one comparison, for every engine and layer."""
