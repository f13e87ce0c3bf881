"""Compiled code of the policies; imported by who plans, since a compiler takes half a second to import."""
