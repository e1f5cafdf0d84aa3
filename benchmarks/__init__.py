"""One script a figure; `make figures ISSUE=n` runs an issue's scripts and writes results/."""
