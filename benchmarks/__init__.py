"""Measurements: each script says how to run it; names that begin with _ are shared by several."""
