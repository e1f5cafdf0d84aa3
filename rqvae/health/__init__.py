"""Training health: logs of any run in, findings with evidence out. Imports no torch, so that it starts at once.

log.py         what a log says: series, events, facts, each with its line
readers/       one file a format; they find out themselves which one it is
subject.py     one run of a log with its config, its source and a sibling: what a check looks at
checks/        one function a finding; what it needs, its threshold and what to do about it stand beside it
examine.py     runs the checks
report_*.py    Markdown, one HTML file, JSON
"""
