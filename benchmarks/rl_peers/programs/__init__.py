"""What runs in the interpreter of each program: ``python -m benchmarks.rl_peers.programs.NAME``."""
