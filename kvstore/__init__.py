"""KV-cache persistence and sharing for LLM inference: identity, tiers, the node and its client."""
