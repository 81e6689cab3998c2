"""How fast and how right: asv suites in ``benchmarks``, a report with pictures beside it."""
