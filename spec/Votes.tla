------------------------------- MODULE Votes -------------------------------
(* The vote of a rank, and the one function that decides: core/votes.py.

   A tally is the set of the votes of all ranks in one round. The code reduces them with MAX over each word and
   over its complement; "equal on all ranks" and "largest" mean the same here. *)
EXTENDS Integers, FiniteSets

Abort == [none |-> 0, PLAN_MISMATCH |-> 1, LOAD_ERROR |-> 2, POLICY_ERROR |-> 3, INVALID_PLAN |-> 4,
          WORKER_ERROR |-> 5, WORKER_DIED |-> 6, INTEGRITY |-> 7, TRANSFER_ERROR |-> 8,
          DEADLINE_COLLECTING |-> 9, DEADLINE_COMPUTING |-> 10, DEADLINE_AWAITING_CONSENSUS |-> 11,
          DEADLINE_TRANSFERRING |-> 12, FROZEN |-> 13, REQUESTED |-> 14, UNRESOLVED_VOTE |-> 15]
Stop == [none |-> 0, CLOSED |-> 1, TIMEOUT |-> 2, TRANSPORT |-> 3, DIVERGED |-> 4, DESYNC |-> 5, COMMIT_FAILED |-> 6]

AbortName(code) == CHOOSE name \in DOMAIN Abort : Abort[name] = code
StopName(code) == CHOOSE name \in DOMAIN Stop : Stop[name] = code

(* Progress: what a vote says about the epoch, in the order of an epoch's life. *)
IdleVote == 0
BusyVote == 1
SkipVote == 2
ReadyVote == 3
StagingVote == 4
StagedVote == 5

Phase(progress) == IF progress = IdleVote THEN 0 ELSE IF progress <= ReadyVote THEN 1 ELSE 2

Largest(numbers) == CHOOSE n \in numbers : \A other \in numbers : other <= n
Smallest(numbers) == CHOOSE n \in numbers : \A other \in numbers : n <= other
Equal(values) == Cardinality(values) = 1

Progresses(tally) == {vote.progress : vote \in tally}

PromisesCommit(vote) ==
    vote.progress = StagedVote /\ vote.stop = 0 /\ vote.abort = 0 /\ ~vote.freeze

Decision(kind, reason) == [kind |-> kind, reason |-> reason, chunks |-> 0]
Nothing == Decision("NONE", "none")

(* What must be equal on all ranks, in every round and while transferring. *)
SamePlace(tally) ==
    /\ Equal({<<vote.generation, vote.round, vote.step, vote.pass, vote.epoch>> : vote \in tally})
    /\ \/ Largest(Progresses(tally)) < StagingVote
       \/ Equal({<<vote.chunk, vote.num_chunks, vote.plan>> : vote \in tally})
    /\ Equal({Phase(progress) : progress \in Progresses(tally)})

SameMap(tally) == Equal({vote.live : vote \in tally})

(* An epoch starts, and a freeze holds, only when no transfer of an earlier epoch is under way on any rank. *)
AllDrained(tally) == \A vote \in tally : vote.drained
MayFreeze(tally) == AllDrained(tally)
MayStart(tally) ==
    AllDrained(tally) /\ Largest({vote.step : vote \in tally}) >= Largest({vote.earliest : vote \in tally})

DecideIdle(tally) ==
    IF \E vote \in tally : vote.freeze
    THEN IF MayFreeze(tally) THEN Decision("FREEZE", "none") ELSE Nothing
    ELSE IF (\E vote \in tally : vote.request) /\ MayStart(tally) THEN Decision("START", "none") ELSE Nothing

(* All ranks have a plan: it must be the same one, or nothing moves. *)
DecidePlan(tally) ==
    IF ~Equal({<<vote.progress, vote.num_chunks, vote.plan>> : vote \in tally})
    THEN Decision("ABORT", "PLAN_MISMATCH")
    ELSE IF Largest(Progresses(tally)) = SkipVote THEN Decision("SKIP", "none") ELSE Decision("BEGIN", "none")

(* All chunks that every rank has staged: one becomes live at each of the steps after the one at which this is read. *)
DecideCommit(tally) ==
    [Decision("COMMIT", "none") EXCEPT !.chunks = Smallest({vote.staged : vote \in tally})
                                                  - Smallest({vote.chunk : vote \in tally})]

Decide(tally) ==
    LET stop == Largest({vote.stop : vote \in tally})
        abort == Largest({vote.abort : vote \in tally})
        slowest == Smallest(Progresses(tally))
    IN IF stop > 0 THEN Decision("STOP", StopName(stop))
       ELSE IF ~SamePlace(tally) THEN Decision("STOP", "DESYNC")
       ELSE IF ~SameMap(tally) THEN Decision("STOP", "DIVERGED")
       ELSE IF Largest(Progresses(tally)) = IdleVote THEN DecideIdle(tally)
       ELSE IF abort > 0 THEN Decision("ABORT", AbortName(abort))
       ELSE IF \E vote \in tally : vote.freeze THEN Decision("ABORT", "FROZEN")
       ELSE IF slowest = StagedVote THEN DecideCommit(tally)
       ELSE IF slowest \in {SkipVote, ReadyVote} THEN DecidePlan(tally)
       ELSE Nothing
=============================================================================
