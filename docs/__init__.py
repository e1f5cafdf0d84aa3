"""The documentation and what generates a part of it; a package, so that no other `docs` can take its name."""
