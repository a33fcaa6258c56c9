"""Measurements behind `moray bench`."""
