"""Answer ranking requests over HTTP from one immutable release at a time."""
