"""How many replicas every expert gets and where they live: pure decisions, no clock and no I/O."""
