"""Playing inside a world model: sessions, their server, and the page."""
