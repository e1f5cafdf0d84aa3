"""Games that run inside the package, the players that record them, and the recorder."""
