"""The stability atlas: the error of every solver against the products it spends, over many systems.

``python -m benchmarks.atlas --help`` says how to run it.  The modules, in the order of the data:

- ``cases``: which systems are solved, as data, and the file that carries them to other processes;
- ``records``: one solve judged: its error, its products, what it said, whether that holds;
- ``ours``: the library's solvers, as data;
- ``compare``: where somebody else is more accurate at no more products;
- ``pictures``: the heat maps and curves.

``cases`` and ``records`` need NumPy only: other packages' solvers run in environments of their own,
without this library, from the same file.
"""
