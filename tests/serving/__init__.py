"""Real serving engines, in a virtual environment of their own."""
