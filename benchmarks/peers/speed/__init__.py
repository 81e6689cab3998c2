"""How long each package takes to an inverse-Hessian-vector product of a given accuracy.

``python -m benchmarks.peers.speed --help`` says how to run it.  The modules, in the order
of the data:

- ``problems``: the systems, as arrays in one file that every process reads (NumPy only);
- ``making``: how the systems and their reference solutions come about;
- ``torch_problems``, ``jax_problems``: the losses and products in the two frameworks;
- ``torch_peers``, ``jax_peers``, ``ours``: who competes, each in a process of its own;
- ``serve``: such a process, which solves what it is told to over a pipe;
- ``turns``: the search for each contender's quickest setting, and the interleaved rounds;
- ``report``: tables, ratios and the picture.
"""
