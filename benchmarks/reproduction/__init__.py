"""BLPO and its baselines at full length, over tasks and seeds, and the report on them."""
