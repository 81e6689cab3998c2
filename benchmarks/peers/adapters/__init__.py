"""One file a package: its solvers as a list of :class:`benchmarks.peers.protocol.Peer`."""
