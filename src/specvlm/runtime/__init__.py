"""A model that runs passes: loading, layers, KV cache, graphs."""
