"""Tokens to expert workers: routing table, dispatch plan, transports (held by attention workers)."""
