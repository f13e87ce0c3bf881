---- MODULE Unreadable ----
EXTENDS Naturals
VARIABLE count
Init == count = = 0
====
