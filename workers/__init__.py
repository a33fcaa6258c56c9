"""The processes that hold weights and KV pages."""
