"""The loop, what it saves and logs, and the two stages' training."""
