"""Who stays: the ladder, byte budgets, ranking, assignment by hand, and the statistics that policies read."""
