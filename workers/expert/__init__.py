"""Expert workers: slots, load counters, the server that answers Forward."""
