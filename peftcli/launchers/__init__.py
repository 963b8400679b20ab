"""From a recipe's `launcher:` section to processes that run the worker. Needs no torch."""
