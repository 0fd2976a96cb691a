"""Rollouts: proposing, verifying and replacing tokens. Knows torch and transformers, not Axolotl."""
