"""Requests to attention workers: admission, the choice of workers, sessions."""
