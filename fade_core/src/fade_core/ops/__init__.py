"""What a step runs: append, attend, note attention mass; the torch references of the ops that kernels implement."""
