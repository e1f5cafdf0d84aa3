"""Losses of Stage1 besides its own."""
