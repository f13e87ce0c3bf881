--------------------------- MODULE AtomicRebalance ---------------------------
(* What a rebalance is, seen from outside: forward passes, and the map that each of them used. A commit says from which
   pass on a map holds, and no rank has made that pass yet; so in every pass all ranks use one map. There are no votes,
   no rounds and no weights here. Rebalance.tla refines it (MCRebalance.tla says how). *)
EXTENDS Integers, Sequences

CONSTANTS Ranks, Slots, InitialMap, MaxPasses, MaxCommits

VARIABLES
    made,       \* forward passes that each rank has made
    used,       \* the map of the last pass of each rank: for each slot the expert that it held
    schedule,   \* every commit, in order: the map, and the first pass that uses it
    phase       \* "serving", "moving" or "stopped"

vars == <<made, used, schedule, phase>>

RECURSIVE MapOf(_, _)
MapOf(commits, pass) ==
    IF commits = <<>> THEN InitialMap
    ELSE LET last == commits[Len(commits)]
         IN IF last.from <= pass THEN last.map ELSE MapOf(SubSeq(commits, 1, Len(commits) - 1), pass)

IsComplete(map) == \A expert \in {InitialMap[slot] : slot \in Slots} : \E slot \in Slots : map[slot] = expert

Init ==
    /\ made = [r \in Ranks |-> 0]
    /\ used = [r \in Ranks |-> InitialMap]
    /\ schedule = <<>>
    /\ phase = "serving"

Pass(r) ==
    /\ made' = [made EXCEPT ![r] = @ + 1]
    /\ used' = [used EXCEPT ![r] = MapOf(schedule, made[r] + 1)]
    /\ UNCHANGED <<schedule, phase>>

Begin == phase = "serving" /\ phase' = "moving" /\ UNCHANGED <<made, used, schedule>>

Commit(map, from) ==
    /\ phase = "moving"
    /\ IsComplete(map)
    /\ \A r \in Ranks : made[r] < from
    /\ schedule' = Append(schedule, [from |-> from, map |-> map])
    /\ UNCHANGED <<made, used, phase>>

(* All chunks are committed, or the epoch is aborted, with what was committed kept. *)
End == phase = "moving" /\ phase' = "serving" /\ UNCHANGED <<made, used, schedule>>
StopForGood == phase # "stopped" /\ phase' = "stopped" /\ UNCHANGED <<made, used, schedule>>

CommitStep ==
    /\ Len(schedule') = Len(schedule) + 1
    /\ Commit(schedule'[Len(schedule')].map, schedule'[Len(schedule')].from)

Next == (\E r \in Ranks : Pass(r)) \/ Begin \/ CommitStep \/ End \/ StopForGood

Spec == Init /\ [][Next]_vars

(* -- the model by itself: what it is bound to, and that it can do what it is about --------------------------------- *)

Identity == [slot \in Slots |-> slot]
Swapped(map) == [map EXCEPT ![0] = map[1], ![1] = map[0]]
Largest(r) == \A other \in Ranks : made[other] <= made[r]
BoundedNext ==
    \/ \E r \in Ranks : made[r] < MaxPasses /\ Pass(r)
    \/ Begin \/ End \/ StopForGood
    \/ /\ Len(schedule) < MaxCommits
       /\ \E r \in Ranks : Largest(r) /\ Commit(Swapped(MapOf(schedule, MaxPasses)), made[r] + 1)
BoundedSpec == Init /\ [][BoundedNext]_vars

SamePassSameMap == \A one, two \in Ranks : made[one] = made[two] => used[one] = used[two]

NeverCommits == \A r \in Ranks : used[r] = InitialMap
NeverAborts == ~(phase = "serving" /\ Len(schedule) = 1)
NeverStops == phase # "stopped"
=============================================================================
