"""Tests against the real vLLM: every answer is compared with vLLM's own, without VCache."""
