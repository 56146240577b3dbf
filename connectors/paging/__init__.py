"""Copies between an engine's paged KV cache and arena slots."""
