"""The asv suites: how fast (:mod:`speed`) and how right (:mod:`stability`)."""
