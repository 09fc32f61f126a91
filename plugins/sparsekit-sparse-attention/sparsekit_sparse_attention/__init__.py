"""Attention to chosen keys: blocks by the score of their summary, and tokens by a router of each head."""
