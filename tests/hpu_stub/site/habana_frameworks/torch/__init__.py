"""Stand-in for the package of this name in habana-frameworks-torch."""
