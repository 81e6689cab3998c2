"""Other packages' solvers on the systems of the atlas, each in an environment of its own.

``python -m benchmarks.peers`` makes the environments, runs ``run`` in each, and leaves one CSV a
package.  An adapter is a file that calls a package through its public interface; nothing
of the package's own code is here.
"""
