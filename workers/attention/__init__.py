"""Attention workers: engine loop, batch scheduler, KV pages, KV transfer, sampler, server."""
