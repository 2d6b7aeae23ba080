"""Attention over sequences that lie on several devices."""
