"""The solvers and the agents on one device; ``python -m benchmarks.gpu`` measures them."""
