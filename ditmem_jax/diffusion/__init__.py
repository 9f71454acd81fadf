"""The mathematics of flow matching: noise levels, objective, solvers, guidance."""
