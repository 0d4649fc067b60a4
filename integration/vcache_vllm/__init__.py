"""VCache as a KV connector of vLLM."""
