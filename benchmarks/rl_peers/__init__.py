"""End-to-end speed of PPO and BLPO training beside other programs, one thread each.

``python -m benchmarks.rl_peers`` runs every program in a process and an interpreter of its own, by
turns. ``programs`` has a module for each: it starts the other's program, or calls the package
through its public interface, and marks times between updates. None of their code is here.
"""
