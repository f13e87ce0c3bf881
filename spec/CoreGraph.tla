------------------------------ MODULE CoreGraph ------------------------------
(* The cores of the ranks and the rounds between them, and nothing else: no workers, no devices, no history. Each
   action is the call of core/rank.py that `call` names, so that every edge of this module's state graph can be
   replayed on the code: tests/spec/test_core_graph.py compares the whole graph with that of the code. *)
EXTENDS Core, TLC

VARIABLES
    core,         \* of each rank
    cast,         \* the last three votes of each rank, the newest first: nobody reads an older one any more
    call          \* what led here: the action, its rank and its argument

Ranks == 0 .. Setup.num_ranks - 1

(* The test reads the constants of a graph from here. *)
ASSUME PrintT(<<"Setup", Setup>>)

Init ==
    /\ core = [r \in Ranks |-> IF r \in Setup.asking THEN request_rebalance(InitialCore(0)) ELSE InitialCore(0)]
    /\ cast = [r \in Ranks |-> <<NoVote, NoVote, NoVote>>]
    /\ call = [action |-> "Init", rank |-> 0, argument |-> "none"]

Calls(action, r, argument) == call' = [action |-> action, rank |-> r, argument |-> argument]
Becomes(r, c) == core' = [core EXCEPT ![r] = c]
Casts(r, vote) == cast' = [cast EXCEPT ![r] = <<vote, @[1], @[2]>>]

(* A rank whose lost decision was resolved makes live what that committed, and gives up. *)
Runs(r) == core[r].state # "STOPPED" /\ ~core[r].leaving

VotesOf(r) == {cast[r][1], cast[r][2], cast[r][3]}
HasVoted(r, round) == \E vote \in VotesOf(r) : vote.round = round
Tally(round) == {(CHOOSE vote \in VotesOf(r) : vote.round = round) : r \in Ranks}
MayRead(r) == Runs(r) /\ ReadIsDue(core[r]) /\ \A other \in Ranks : HasVoted(other, core[r].posted.round)
DecisionFor(r) == Decide(Tally(core[r].posted.round))

(* -- what every epoch has -------------------------------------------------------------------------------------- *)

(* In lockstep nobody is a forward pass behind, but who has left. *)
Step(r, steps) ==
    /\ Runs(r) \/ core[r].decided > 0
    /\ ~CommitIsDue(core[r]) /\ ~ReadIsDue(core[r]) /\ ~PostIsDue(core[r])
    /\ \A other \in Ranks : core[other].state = "STOPPED" \/ core[other].step >= core[r].step
    /\ core[r].step + steps <= Setup.max_steps
    /\ Becomes(r, [core[r] EXCEPT !.step = @ + steps])
    /\ Calls("Step", r, steps)
    /\ UNCHANGED cast

PostVote(r, pass, drained) ==
    /\ Runs(r)
    /\ PostIsDue(core[r])
    /\ drained \/ (core[r].epoch > 0 /\ ~Active(core[r]))  \* while active it means nothing
    /\ LET c == post_vote(core[r], pass, drained)
       IN Becomes(r, c) /\ Casts(r, c.posted)
    /\ Calls("PostVote", r, [pass |-> pass, drained |-> drained])

ReadRound(r) ==
    /\ MayRead(r)
    /\ Becomes(r, read_round(core[r], DecisionFor(r)))
    /\ Calls("ReadRound", r, DecisionFor(r))
    /\ UNCHANGED cast

CommitChunk(r) ==
    /\ CommitIsDue(core[r])
    /\ Becomes(r, commit_chunk(core[r]))
    /\ Calls("CommitChunk", r, "none")
    /\ UNCHANGED cast

(* What the worker reports is taken after commits were made and a round was read, and before the next one is posted. *)
Takes(r, action, argument, c) ==
    /\ ~HasPosted(core[r]) /\ ~CommitIsDue(core[r])
    /\ Becomes(r, c)
    /\ Calls(action, r, argument)
    /\ UNCHANGED cast

LoadCollected(r) ==
    /\ Runs(r)
    /\ core[r].state = "COLLECTING"
    /\ Takes(r, "LoadCollected", "none", load_collected(core[r], core[r].epoch))
PlanReady(r, plan) ==
    /\ Runs(r)
    /\ core[r].state = "COMPUTING"
    /\ Takes(r, "PlanReady", plan, plan_ready(core[r], core[r].epoch, plan))
ChunkStaged(r) ==
    /\ Runs(r)
    /\ core[r].state = "TRANSFERRING"
    /\ core[r].staged < NumChunks
    /\ Takes(r, "ChunkStaged", "none", chunk_staged(core[r], core[r].epoch, core[r].staged))

(* -- what goes wrong in the background --------------------------------------------------------------------------- *)

WorkFailed(r, reason) ==
    /\ Runs(r)
    /\ Active(core[r])
    /\ Takes(r, "WorkFailed", reason, work_failed(core[r], core[r].epoch, reason))
(* What belongs to an epoch that is over changes nothing, also on a rank that has stopped. *)
LateResult(r, action) ==
    LET c == core[r]
        late == IF Active(c) THEN c.epoch - 1 ELSE c.epoch
        after == CASE action = "LoadCollected" -> load_collected(c, late)
                   [] action = "PlanReady" -> plan_ready(c, late, "b")
                   [] action = "ChunkStaged" -> chunk_staged(c, late, 0)
                   [] action = "WorkFailed" -> work_failed(c, late, "WORKER_ERROR")
    IN /\ ~c.leaving
       /\ late > 0
       /\ Takes(r, "LateResult", action, after)
TransportLost(r) == Runs(r) /\ Takes(r, "TransportLost", "none", transport_lost(core[r]))

(* -- what the engine asks for -------------------------------------------------------------------------------------- *)

Asks(r, action, c) ==
    /\ Runs(r)
    /\ Becomes(r, c)
    /\ Calls(action, r, "none")
    /\ UNCHANGED cast

(* -- leaving alone --------------------------------------------------------------------------------------------------- *)

Leaves(r, c, action, reason) ==
    /\ Becomes(r, after_last_vote(c, reason))
    /\ IF c.leaving THEN UNCHANGED cast ELSE Casts(r, last_vote(c, reason))
    /\ Calls(action, r, reason)

GiveUp(r, reason) ==
    /\ core[r].state # "STOPPED"
    /\ \/ Runs(r) /\ ReadIsDue(core[r]) /\ ~InWindow(core[r])
       \/ core[r].leaving /\ core[r].decided = 0 /\ reason = "TIMEOUT"
    /\ Leaves(r, core[r], "GiveUp", reason)
Close(r) ==
    \/ core[r].state # "STOPPED" /\ Leaves(r, core[r], "Close", "CLOSED")
    \/ core[r].state = "STOPPED" /\ Calls("Close", r, "CLOSED") /\ UNCHANGED <<core, cast>>
(* Nothing, or some of the chunks that it has promised. *)
ResolveRound(r) ==
    /\ Runs(r)
    /\ ReadIsDue(core[r]) /\ InWindow(core[r])
    /\ \E chunks \in 0 .. core[r].posted.staged - core[r].posted.chunk :
          /\ Becomes(r, resolve_round(core[r], chunks, "TIMEOUT"))
          /\ Casts(r, last_vote(resolve_round(core[r], chunks, "TIMEOUT"), "TIMEOUT"))
          /\ Calls("ResolveRound", r, chunks)
CommitFailed(r) ==
    /\ CommitIsDue(core[r])
    /\ Leaves(r, core[r], "CommitFailed", "COMMIT_FAILED")

(* -- what the invariants of a sound engine exclude, and votes must find --------------------------------------------- *)

OtherPlacement(r) ==
    /\ Runs(r)
    /\ core[r].live >= 0
    /\ Becomes(r, [core[r] EXCEPT !.live = -1])
    /\ Calls("OtherPlacement", r, "none")
    /\ UNCHANGED cast

(* -------------------------------------------------------------------------------------------------------------------- *)

RankNext(r) ==
    LET May(action) == action \in Setup.allowed[r]
    IN \/ Step(r, 1)
       \/ PostVote(r, 0, TRUE)
       \/ ReadRound(r)
       \/ CommitChunk(r)
       \/ LoadCollected(r)
       \/ \E plan \in Setup.plans[r] : PlanReady(r, plan)
       \/ ChunkStaged(r)
       \/ May("Undrained") /\ PostVote(r, 0, FALSE)
       \/ May("OtherPass") /\ PostVote(r, 1, TRUE)
       \/ May("SkipStep") /\ Step(r, 2)
       \/ May("OtherPlacement") /\ OtherPlacement(r)
       \/ \E reason \in Setup.allowed[r] \cap DOMAIN Abort : WorkFailed(r, reason)
       \/ May("LateResult")
          /\ \E action \in {"LoadCollected", "PlanReady", "ChunkStaged", "WorkFailed"} : LateResult(r, action)
       \/ May("TransportLost") /\ TransportLost(r)
       \/ May("RequestRebalance") /\ Asks(r, "RequestRebalance", request_rebalance(core[r]))
       \/ May("RequestFreeze") /\ Asks(r, "RequestFreeze", request_freeze(core[r]))
       \/ May("RequestUnfreeze") /\ Asks(r, "RequestUnfreeze", request_unfreeze(core[r]))
       \/ May("RequestAbort") /\ Asks(r, "RequestAbort", request_abort(core[r]))
       \/ May("RequestStop") /\ Asks(r, "RequestStop", request_stop(core[r]))
       \/ May("GiveUp") /\ \E reason \in {"TIMEOUT", "TRANSPORT"} : GiveUp(r, reason)
       \/ May("GiveUp") /\ ResolveRound(r)
       \/ May("Close") /\ Close(r)
       \/ May("CommitFailed") /\ CommitFailed(r)

Next == \E r \in Ranks : RankNext(r)
Spec == Init /\ [][Next]_<<core, cast, call>>

(* Without lag, rounds follow each other within one step for as long as the workers take. *)
Bounded == \A r \in Ranks : core[r].epoch <= Setup.max_epochs /\ core[r].round <= Setup.max_rounds

(* -- setups of the graphs -------------------------------------------------------------------------------------------- *)

NextPlacement(live, plan, chunk) == live + 1

Each(zero, one) == (0 :> zero @@ 1 :> one)
Both(set) == Each(set, set)

(* allowed: what each rank may do beyond an epoch in which nothing goes wrong. *)
Plain ==
    [lag |-> 1, idle_interval |-> 2, backoff |-> 1,
     deadline |-> [COLLECTING |-> 2, COMPUTING |-> 2, AWAITING_CONSENSUS |-> 3, TRANSFERRING |-> 5], drain_deadline |-> 3,
     num_chunks |-> 2, num_ranks |-> 2, asking |-> {0}, plans |-> Both({"a"}), allowed |-> Both({}),
     max_steps |-> 7, max_epochs |-> 1, max_rounds |-> 20]
OneChunk == [Plain EXCEPT !.num_chunks = 1, !.max_steps = 5]
Again == [OneChunk EXCEPT !.idle_interval = 1, !.max_epochs = 2]

Lag2 == [Plain EXCEPT !.lag = 2, !.max_steps = 11]
Sync == [Plain EXCEPT !.lag = 0, !.max_steps = 4, !.max_epochs = 2, !.max_rounds = 7]
Mismatch == [OneChunk EXCEPT !.plans = Each({"a", "skip"}, {"a", "b", "skip"}), !.max_epochs = 2, !.max_steps = 6]
Late == [OneChunk EXCEPT !.deadline = [state \in ActiveStates |-> 1], !.max_epochs = 2, !.max_steps = 7]
Failures == {"LOAD_ERROR", "POLICY_ERROR", "INVALID_PLAN", "WORKER_ERROR", "WORKER_DIED", "INTEGRITY", "TRANSFER_ERROR"}
Failing == [OneChunk EXCEPT !.allowed = Each(Failures, {}), !.max_steps = 4]
Superseded == [Again EXCEPT !.allowed = Each({"TRANSFER_ERROR"}, {"LateResult"})]
Undrained == [Again EXCEPT !.allowed = Each({"Undrained", "INTEGRITY"}, {}), !.drain_deadline = 1]
Asked == [OneChunk EXCEPT !.asking = {}, !.allowed = Each({"RequestRebalance"}, {})]
Frozen == [OneChunk EXCEPT !.allowed = Each({"RequestFreeze", "RequestUnfreeze"}, {})]
Aborted == [OneChunk EXCEPT !.allowed = Each({"RequestAbort"}, {})]
Ended == [OneChunk EXCEPT !.allowed = Each({"RequestStop"}, {"TransportLost"})]
Lost == [OneChunk EXCEPT !.allowed = Both({"GiveUp"}), !.max_steps = 6]
Several == [Plain EXCEPT !.allowed = Each({"GiveUp"}, {})]
(* A round is posted while commits of the one before are left. *)
Overlap == [Lag2 EXCEPT !.num_chunks = 3]
Closed == [OneChunk EXCEPT !.allowed = Both({"Close"}), !.max_steps = 6]
Broken == [Plain EXCEPT !.allowed = Both({"CommitFailed"})]
Unequal == [OneChunk EXCEPT !.allowed = Each({"OtherPlacement"}, {"OtherPass", "SkipStep"})]

(* Three ranks: two that agree do not outvote the third. *)
OfThree(zero, one, two) == (0 :> zero @@ 1 :> one @@ 2 :> two)
Three ==
    [OneChunk EXCEPT !.num_ranks = 3, !.idle_interval = 1, !.plans = OfThree({"a"}, {"a"}, {"a"}),
                     !.allowed = OfThree({}, {}, {}), !.max_steps = 3]
ThreeSync == [Three EXCEPT !.lag = 0, !.max_steps = 1, !.max_rounds = 3]
ThreeLost ==
    [ThreeSync EXCEPT !.plans = OfThree({"a"}, {"a"}, {"skip"}), !.allowed = OfThree({"GiveUp"}, {}, {"TRANSFER_ERROR"})]

(* Larger ones, for a machine that has the night. *)
Three4 == [Three EXCEPT !.max_steps = 4]
Plain3 == [Plain EXCEPT !.num_chunks = 3, !.max_steps = 9]
Again3 == [Again EXCEPT !.max_epochs = 3, !.max_steps = 8]
Lost2 == [Lost EXCEPT !.lag = 2, !.num_chunks = 2, !.max_steps = 10, !.allowed = Each({"GiveUp"}, {"GiveUp", "Close"})]
Frozen2 == [Again EXCEPT !.allowed = Each({"RequestFreeze", "RequestUnfreeze"}, {"Undrained"}), !.max_steps = 6]
Asked2 == [Asked EXCEPT !.allowed = Each({"RequestRebalance"}, {"RequestAbort"}), !.max_steps = 6]
=============================================================================
