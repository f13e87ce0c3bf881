-------------------------- MODULE SeedMaxPlusSlack --------------------------
(* A rule that does not work: begin the transfer at the largest of all step counters plus some slack.

   On each rank a background thread computes the plan, sends the step counter of that moment to all ranks, and waits
   for the counters of all others. The decode loop asks its own thread between two forward passes; it never waits for
   it, unless `Waits`. A rank whose thread does not have all counters yet runs the next forward pass. *)
EXTENDS Integers

CONSTANTS
    NumRanks,
    Slack,
    Waits,       \* whether a rank waits for its thread before the first step at which the transfer might begin
    IsLockstep,  \* whether a forward pass needs every rank in it, as an all-to-all does
    MaxSteps     \* forward passes of each rank, so that there are finitely many states

VARIABLES
    step,     \* forward passes that each rank has completed
    doing,    \* what its decode loop is in: "between" two passes, "forward", or "transfer"
    counter,  \* the step counter that its thread sent, Never before its plan was there
    heard,    \* the ranks whose counters its thread has
    begun     \* the step at which it entered the transfer, Never before

vars == <<step, doing, counter, heard, begun>>

Ranks == 1 .. NumRanks
Never == -1

Knows(r) == heard[r] = Ranks
Largest(numbers) == CHOOSE n \in numbers : \A other \in numbers : other <= n
BeginStep == Largest({counter[r] : r \in Ranks}) + Slack  \* once all have sent

IsDue(r) == Knows(r) /\ begun[r] = Never /\ step[r] >= BeginStep
MustWait(r) == Waits /\ ~Knows(r) /\ counter[r] # Never /\ step[r] >= counter[r] + Slack

Entered(r) == step[r] + (IF doing[r] = "forward" THEN 1 ELSE 0)
Needs(r, other) == IsLockstep /\ doing[r] = "forward" /\ Entered(other) < Entered(r)

(* -- the background thread: each of these takes as long as it takes ------------------------------------------------ *)

Send(r) ==
    /\ counter[r] = Never
    /\ counter' = [counter EXCEPT ![r] = step[r]]
    /\ heard' = [heard EXCEPT ![r] = @ \cup {r}]
    /\ UNCHANGED <<step, doing, begun>>

Hear(r, other) ==
    /\ counter[other] # Never
    /\ other \notin heard[r]
    /\ heard' = [heard EXCEPT ![r] = @ \cup {other}]
    /\ UNCHANGED <<step, doing, counter, begun>>

(* -- the decode loop ----------------------------------------------------------------------------------------------- *)

StartPass(r) ==
    /\ doing[r] = "between"
    /\ step[r] < MaxSteps
    /\ ~IsDue(r)
    /\ ~MustWait(r)
    /\ doing' = [doing EXCEPT ![r] = "forward"]
    /\ UNCHANGED <<step, counter, heard, begun>>

EndPass(r) ==
    /\ doing[r] = "forward"
    /\ \A other \in Ranks : ~Needs(r, other)
    /\ doing' = [doing EXCEPT ![r] = "between"]
    /\ step' = [step EXCEPT ![r] = @ + 1]
    /\ UNCHANGED <<counter, heard, begun>>

EnterTransfer(r) ==
    /\ doing[r] = "between"
    /\ IsDue(r)
    /\ doing' = [doing EXCEPT ![r] = "transfer"]
    /\ begun' = [begun EXCEPT ![r] = step[r]]
    /\ UNCHANGED <<step, counter, heard>>

EndTransfer ==
    /\ \A r \in Ranks : doing[r] = "transfer"
    /\ doing' = [r \in Ranks |-> "between"]
    /\ UNCHANGED <<step, counter, heard, begun>>

Init ==
    /\ step = [r \in Ranks |-> 0]
    /\ doing = [r \in Ranks |-> "between"]
    /\ counter = [r \in Ranks |-> Never]
    /\ heard = [r \in Ranks |-> {}]
    /\ begun = [r \in Ranks |-> Never]

Listen(r) == \E other \in Ranks : Hear(r, other)
Next == EndTransfer \/ \E r \in Ranks : Send(r) \/ Listen(r) \/ StartPass(r) \/ EndPass(r) \/ EnterTransfer(r)
Spec == Init /\ [][Next]_vars

(* Decode loops go on where they can and messages arrive; a plan may take for ever. *)
FairDecoding ==
    WF_vars(EndTransfer) /\ \A r \in Ranks : WF_vars(Listen(r)) /\ WF_vars(StartPass(r) \/ EndPass(r) \/ EnterTransfer(r))
DecodingSpec == Spec /\ FairDecoding

(* And every plan is there at last. *)
ComputingSpec == DecodingSpec /\ \A r \in Ranks : WF_vars(Send(r))

(* -- what should hold ---------------------------------------------------------------------------------------------- *)

(* Nobody waits in the transfer for a rank that waits in a forward pass for it: neither would ever end. *)
NoMixedWait == \A r, other \in Ranks : doing[r] = "transfer" => ~Needs(other, r)

(* All begin at one step, and no rank runs a forward pass past the step at which another began. *)
SameStep ==
    \A r, other \in Ranks : begun[r] # Never =>
        IF begun[other] = Never THEN Entered(other) <= begun[r] ELSE begun[other] = begun[r]

(* Decoding goes on, whatever the rebalance does. *)
GoesOn == \A r \in Ranks : <>(step[r] = MaxSteps)

(* -- reachability: each of these must be violated ------------------------------------------------------------------ *)

NeverServesOn == ~\A r \in Ranks : begun[r] # Never /\ step[r] > begun[r]

(* A decode loop stands still though no message is under way: what it waits for is the plan of another rank. *)
NoMessageUnderWay == \A r, other \in Ranks : counter[other] # Never => other \in heard[r]
NeverWaitsForCompute == \A r \in Ranks : doing[r] = "between" /\ MustWait(r) => ~NoMessageUnderWay
=============================================================================
