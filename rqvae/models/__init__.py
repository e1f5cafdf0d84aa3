"""Models: interfaces, Stage1, connectors, Stage2, losses."""
