---- MODULE Counter ----
(* Counts up to Top and begins again: small, and every kind of claim about it can be made. *)
EXTENDS Naturals
CONSTANT Top
VARIABLE count

Init == count = 0
Next == count' = (count + 1) % (Top + 1)
Spec == Init /\ [][Next]_count /\ WF_count(Next)

InRange == count <= Top
BelowTop == count < Top
NotZero == count # 0
Rises == [][count' > count]_count
Reaches == []<>(count = Top)
Stays == <>[](count = 0)
NotANumber == count.field
====
