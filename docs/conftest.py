"""Keeps pytest from importing the site's configuration and the example scripts for doctests."""

collect_ignore_glob = ["conf.py", "_ext/*", "examples/*"]
