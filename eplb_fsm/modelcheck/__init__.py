"""Runs TLC on the specification in `spec/`, and reads what it says."""
