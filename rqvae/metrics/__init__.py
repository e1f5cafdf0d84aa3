"""Scores of images. Imports no other room; what must be summed over ranks comes out as one tensor of sums."""
