------------------------------- MODULE Traces -------------------------------
(* Whether the ranks of a run did what the protocol allows: `eplb-fsm trace check`.

   A run is what its ranks recorded, each in its own order. One step takes the next event of one rank: time passes on
   it up to the event, the action of that name happens to its core, and the rank must be in the state that the event
   says. The only thing that no rank records is when a vote reaches another rank, so a rank whose next event is not
   possible yet waits for the others. What is possible once stays possible, so it does not matter which rank goes first.

   The cores are those of Core.tla; when what may happen to them is as in Rebalance.tla. Rows, buffers and devices are
   not in a trace. *)
EXTENDS Core, TLC

(* A sequence of records: constants of a run, its plans, and the events of each rank. The module of the runs, which
   extends this one, puts it into TLC's register 1: as a constant TLC would look through all of it again and again. *)
Runs == TLCGet(1)

VARIABLES
    run,       \* which of them
    taken,     \* events taken of each rank
    core,      \* as in Rebalance.tla ...
    cast,
    window,
    journal,
    up,
    commits,   \* chunks that were committed in the last two epochs
    verdict    \* "none" while events are left

vars == <<run, taken, core, cast, window, journal, up, commits, verdict>>

(* -- what is constant in a run --------------------------------------------------------------------------------- *)

Its == Runs[run]
Ranks == 0 .. Len(Its.events) - 1
RunLag == Its.lag
RunNumBuffers == Its.num_buffers
RunIdleInterval == Its.idle_interval
RunDrainDeadline == Its.drain_deadline

(* A plan is called by its digest; it says how many chunks it has, and the placement after each. *)
PlanOf(plan) == Its.plans[plan]
RunChunksOf(plan) == PlanOf(plan).num_chunks
RunIsSkip(plan) == plan # NoPlan /\ PlanOf(plan).is_skip
RunDeadlineIn(state, plan) ==
    IF state # "TRANSFERRING" THEN Its.deadline[state] ELSE IF plan = NoPlan THEN 0 ELSE PlanOf(plan).deadline
RunSuccessor(live, plan, chunk) == PlanOf(plan).lives[chunk + 1]

Init ==
    /\ run \in DOMAIN Runs
    /\ taken = [r \in Ranks |-> 0]
    /\ core = [r \in Ranks |-> InitialCore(Its.live)]
    /\ cast = [r \in Ranks |-> <<NoVote, NoVote, NoVote>>]
    /\ window = [r \in Ranks |-> "no"]
    /\ journal = [r \in Ranks |-> EmptyJournal]
    /\ up = [r \in Ranks |-> "up"]
    /\ commits = {}
    /\ verdict = "none"

(* -- events ------------------------------------------------------------------------------------------------------------ *)

(* An event is a sequence, since TLC takes long to read records: what happened, at which step, the state after it, and
   what the action is about. eplb_fsm/modelcheck/encoding.py writes them. *)
StateOf(t) ==
    [state |-> t[3], epoch |-> t[4], round |-> t[5], chunk |-> t[6], staged |-> t[7], drained |-> t[8],
     frozen |-> t[9], live |-> t[10], outcome |-> t[11]]
Argument(t) ==
    LET a(i) == t[11 + i]
    IN CASE t[1] = "PostVote" ->
              [pass |-> a(1), lag |-> a(2),
               vote |-> [progress |-> a(3), abort |-> a(4), stop |-> a(5), request |-> a(6), freeze |-> a(7),
                         earliest |-> a(8)]]
         [] t[1] \in {"ReadRound", "ResolveRound"} ->
              [decision |-> [kind |-> a(1), reason |-> a(2), chunks |-> a(3)], earliest |-> a(4), lost |-> a(5)]
         [] t[1] = "CommitChunk" -> [chunk |-> a(1), earliest |-> a(2)]
         [] t[1] = "PlanReady" ->
              [plan |-> a(1), terms |-> [num_chunks |-> a(2), is_skip |-> a(3), deadline |-> a(4)]]
         [] t[1] = "ChunkStaged" -> [after |-> a(1)]
         [] t[1] \in {"GiveUp", "WorkFailed"} -> [reason |-> a(1)]
         [] t[1] = "FailStop" -> [cause |-> a(1)]
         [] OTHER -> <<>>
EventOf(t) == [action |-> t[1], step |-> t[2], state |-> StateOf(t)] @@ Argument(t)

HasNext(r) == taken[r] < Len(Its.events[r + 1])
NextOf(r) == EventOf(Its.events[r + 1][taken[r] + 1])

(* -- time ------------------------------------------------------------------------------------------------------------ *)

At(r, e) == [core[r] EXCEPT !.step = e.step]

GoesOn(r) == window[r] = "no" \/ (window[r] = "resolved" /\ core[r].decided > 0)

(* No step is passed at which something is due; but where the engine's pass numbers are the clock, they may skip one. *)
TimeMayPass(r, e) ==
    LET c == core[r]
        round_due == IF HasPosted(c) THEN c.read_due ELSE c.post_due
        due == IF c.commit_due < round_due THEN c.commit_due ELSE round_due
    IN \/ e.step = c.step
       \/ e.step > c.step /\ GoesOn(r) /\ (e.step <= due \/ Its.has_pass_ids)

(* -- rounds ------------------------------------------------------------------------------------------------------------ *)

HasVoted(r, round) == \E i \in DOMAIN cast[r] : cast[r][i].round = round
VoteOf(r, round) == cast[r][CHOOSE i \in DOMAIN cast[r] : cast[r][i].round = round]
Tally(round) == {VoteOf(r, round) : r \in Ranks}
IsComplete(round) == \A r \in Ranks : HasVoted(r, round)
WithLag(vote, voted) == [word \in DOMAIN vote \cup {"lag"} |-> IF word = "lag" THEN voted ELSE vote[word]]

(* -- what an event does: whether it may happen, the core after it, and what changes around the core ----------------- *)

Becomes(may, c) == [may |-> may, core |-> c, vote |-> NoVote, window |-> "same", up |-> "up", gave_up |-> FALSE]

Asking(e, c) ==
    LET after == CASE e.action = "Request" -> request_rebalance(c)
                   [] e.action = "Freeze" -> request_freeze(c)
                   [] e.action = "Unfreeze" -> request_unfreeze(c)
                   [] e.action = "AskAbort" -> request_abort(c)
                   [] e.action = "AskStop" -> request_stop(c)
    IN Becomes(c.state # "STOPPED" /\ after # c, after)

Posting(r, e, c) ==
    LET after == post_vote(c, e.pass, e.state.drained)
        vote == after.posted
        says == [progress |-> vote.progress, abort |-> vote.abort, stop |-> vote.stop, request |-> vote.request,
                 freeze |-> vote.freeze, earliest |-> vote.earliest]
        last == cast[r][1]
        raises == last # NoVote => last.lag <= e.lag  \* what a rank asks for grows and never falls
    IN [Becomes(c.state # "STOPPED" /\ window[r] = "no" /\ PostIsDue(c) /\ says = e.vote /\ raises, after)
        EXCEPT !.vote = WithLag(vote, e.lag)]

(* How long the back-off after an abort is, is up to the code, within its bounds. *)
EarliestIsRight(e, c, decision) ==
    IF decision.kind = "ABORT" THEN c.step + Its.backoff <= e.earliest /\ e.earliest <= c.step + Its.max_backoff
    ELSE e.earliest = c.earliest

(* What a rank asks for is adopted while idle. *)
WithLagOf(tally, c, decision) ==
    IF Active(c) \/ decision.kind = "STOP" THEN c ELSE [c EXCEPT !.lag = Largest({vote.lag : vote \in tally})]

Reading(r, e, c) ==
    LET decision == Decide(Tally(c.posted.round))
        may == window[r] = "no" /\ ReadIsDue(c) /\ IsComplete(c.posted.round)
               /\ decision = e.decision
        after == read_round(WithLagOf(Tally(c.posted.round), c, decision), decision)
    IN IF ~may THEN Becomes(FALSE, c)
       ELSE Becomes(EarliestIsRight(e, c, decision), [after EXCEPT !.earliest = e.earliest])

(* The cool-down follows the last commit of an epoch. Who comes too late for a commit does not make it. *)
Committing(e, c) ==
    LET after == commit_chunk(c)
        earliest == IF after.state = "IDLE" /\ Its.cooldown > 0 THEN c.step + Its.cooldown ELSE c.earliest
    IN IF ~CommitIsDue(c) \/ c.step > c.commit_due THEN Becomes(FALSE, c)
       ELSE Becomes(e.chunk = c.chunk /\ e.earliest = earliest, [after EXCEPT !.earliest = earliest])

(* A rank that leaves alone posts a last vote, which says STOP; whoever has resolved a round has done so. *)
LeavesAlone(may, c, reason) ==
    [Becomes(may, after_last_vote(c, reason))
        EXCEPT !.vote = IF c.leaving THEN NoVote ELSE WithLag(last_vote(c, reason), 0),
               !.gave_up = InWindow(c), !.window = "no"]

FailingCommit(c) == [LeavesAlone(CommitIsDue(c), c, "COMMIT_FAILED") EXCEPT !.up = "failed"]

GivingUp(r, e, c) ==
    LET may == \/ window[r] = "no" /\ ReadIsDue(c) /\ ~InWindow(c)
               \/ window[r] = "resolved" /\ c.decided = 0
    IN LeavesAlone(may, c, e.reason)

GivingUpReading(r, c) ==
    [Becomes(window[r] = "no" /\ ReadIsDue(c) /\ InWindow(c), c) EXCEPT !.window = "resolving", !.gave_up = TRUE]

Resolving(r, e, c) ==
    LET found == resolve({journal[other] : other \in Ranks}, c.posted.round)
        decides == IF found = 0 THEN Decision("ABORT", "UNRESOLVED_VOTE")
                   ELSE [Decision("COMMIT", "none") EXCEPT !.chunks = found]
        may == window[r] = "resolving" /\ found # Open /\ decides = e.decision
        after == resolve_round(c, found, e.lost)
    IN IF ~may THEN Becomes(FALSE, c)
       ELSE [Becomes(EarliestIsRight(e, c, decides), [after EXCEPT !.earliest = e.earliest])
             EXCEPT !.window = "resolved", !.vote = WithLag(last_vote(after, e.lost), 0)]

Takes(c) == ~CommitIsDue(c) /\ ~ReadIsDue(c)

Working(e, c) ==
    CASE e.action = "LoadCollected" -> Becomes(Takes(c) /\ c.state = "COLLECTING", load_collected(c, c.epoch))
      [] e.action = "PlanReady" ->
            Becomes(Takes(c) /\ c.state = "COMPUTING" /\ PlanOf(e.plan) = [lives |-> PlanOf(e.plan).lives] @@ e.terms,
                  plan_ready(c, c.epoch, e.plan))
      [] e.action = "ChunkStaged" ->
            LET may == Takes(c) /\ c.state = "TRANSFERRING" /\ c.staged < ChunksOf(c.plan)
            IN Becomes(may /\ PlanOf(c.plan).lives[c.staged + 1] = e.after, chunk_staged(c, c.epoch, c.staged))
      [] e.action = "WorkFailed" ->
            Becomes(Takes(c) /\ Active(c) /\ c.abort = 0 /\ e.reason \in DOMAIN Abort, work_failed(c, c.epoch, e.reason))
      [] e.action = "TransportLost" -> Becomes(Takes(c) /\ c.state # "STOPPED", transport_lost(c))

(* A rank that may not serve on says so itself: for a decision that nobody knows, a row that is not what it was, or
   tables that it could not write. *)
FailingStop(r, e, c) ==
    [Becomes(e.cause \in {"SLOT_DAMAGED", "TABLES_DAMAGED"} \/ window[r] = "resolving", c) EXCEPT !.up = "failed"]

After(r, e) ==
    LET c == At(r, e)
        action == e.action
    IN CASE action = "Init" -> Becomes(taken[r] = 0, c)
         [] action \in {"Request", "Freeze", "Unfreeze", "AskAbort", "AskStop"} -> Asking(e, c)
         [] action = "PostVote" -> Posting(r, e, c)
         [] action = "ReadRound" -> Reading(r, e, c)
         [] action = "CommitChunk" -> Committing(e, c)
         [] action = "CommitFailed" -> FailingCommit(c)
         [] action = "GiveUp" -> GivingUp(r, e, c)
         [] action = "GiveUpReading" -> GivingUpReading(r, c)
         [] action = "ResolveRound" -> Resolving(r, e, c)
         [] action = "FailStop" -> FailingStop(r, e, c)
         [] action = "Close" -> [LeavesAlone(c.state # "STOPPED", c, "CLOSED") EXCEPT !.up = "left"]
         [] OTHER -> Working(e, c)

(* The state that the event says. *)
Outcome(before, after) == IF after.outcome = before.outcome THEN "" ELSE after.outcome.kind
Projected(before, c) ==
    [state |-> c.state, epoch |-> c.epoch, round |-> c.round, chunk |-> c.chunk, staged |-> c.staged,
     drained |-> c.drained, frozen |-> c.frozen, live |-> c.live, outcome |-> Outcome(before, c)]

IsPossible(r, e, after) ==
    /\ up[r] = "up"
    /\ TimeMayPass(r, e)
    /\ after.may
    /\ Projected(core[r], after.core) = e.state
CanTake(r) == HasNext(r) /\ IsPossible(r, NextOf(r), After(r, NextOf(r)))

(* Whether a rank may only be waiting for a vote of another one. *)
MayWait(r) ==
    LET c == At(r, NextOf(r))
    IN \/ NextOf(r).action = "ReadRound" /\ HasPosted(c) /\ ~IsComplete(c.posted.round)
       \/ NextOf(r).action = "ResolveRound" /\ window[r] = "resolving"
          /\ resolve({journal[other] : other \in Ranks}, c.posted.round) = Open

(* -- taking it ----------------------------------------------------------------------------------------------------------- *)

JournalAfter(r, e, after) ==
    LET j == journal[r]
        c == core[r]
        reads == e.action \in {"ReadRound", "ResolveRound"}
        posts == e.action = "PostVote"
        stops == CASE after.vote # NoVote /\ ~posts -> c.round + 1
                   [] e.action = "ReadRound" /\ e.decision.kind = "STOP" -> c.posted.round + 1
                   [] OTHER -> j.stopped_from
    IN [posted |-> IF posts THEN after.core.round ELSE j.posted,
        staged |-> IF posts THEN PromisesCommit(after.vote) ELSE j.staged,
        read |-> IF reads THEN c.posted.round ELSE j.read,
        read_commits |-> IF reads THEN e.decision.chunks ELSE j.read_commits,
        gave_up |-> IF after.gave_up THEN c.round ELSE j.gave_up,
        stopped_from |-> stops]

CommitsAfter(r, e) ==
    LET c == core[r]
        kept == {commit \in commits : commit.epoch >= c.epoch - 1}
    IN IF e.action = "CommitChunk"
       THEN kept \cup {[epoch |-> c.epoch, chunk |-> c.chunk, step |-> e.step, plan |-> c.plan, live |-> e.state.live]}
       ELSE commits

Take(r) ==
    LET e == NextOf(r)
        after == After(r, e)
    IN /\ taken' = [taken EXCEPT ![r] = @ + 1]
       /\ core' = [core EXCEPT ![r] = after.core]
       /\ cast' = IF after.vote = NoVote THEN cast ELSE [cast EXCEPT ![r] = <<after.vote, @[1], @[2]>>]
       /\ window' = IF after.window = "same" THEN window ELSE [window EXCEPT ![r] = after.window]
       /\ up' = [up EXCEPT ![r] = after.up]
       /\ journal' = [journal EXCEPT ![r] = JournalAfter(r, e, after)]
       /\ commits' = CommitsAfter(r, e)
       /\ UNCHANGED <<run, verdict>>

(* -- what must hold in every state, as in MCRebalance.tla --------------------------------------------------------------- *)

Serving == {r \in Ranks : up[r] = "up"}
SamePlan == SamePlanIn(core)
NoTransferWithoutConsensus == NoTransferWithoutConsensusIn(core, Serving)
CommitCannotFail == \A r \in Serving : window[r] # "resolved" => CommitCannotFailIn(core[r])
OutcomeRecorded == \A r \in Ranks : OutcomeRecordedIn(core[r])
EpochBounded == Its.has_pass_ids \/ \A r \in Ranks : EpochBoundedIn(core[r])
SameStepCommit ==
    \A one, two \in commits :
        one.epoch = two.epoch /\ one.chunk = two.chunk =>
            one.plan = two.plan /\ one.live = two.live /\ (one.step = two.step \/ Its.has_pass_ids)

Broken ==
    CASE ~SamePlan -> "SamePlan"
      [] ~NoTransferWithoutConsensus -> "NoTransferWithoutConsensus"
      [] ~CommitCannotFail -> "CommitCannotFail"
      [] ~OutcomeRecorded -> "OutcomeRecorded"
      [] ~EpochBounded -> "EpochBounded"
      [] ~SameStepCommit -> "SameStepCommit"
      [] OTHER -> "none"

(* -- the verdict on a run -------------------------------------------------------------------------------------------------- *)

RECURSIVE FirstOf(_)
FirstOf(r) == IF r \notin Ranks THEN -1 ELSE IF CanTake(r) THEN r ELSE FirstOf(r + 1)

(* Of a rank that is stuck: where, what it is, and what its next event would make of it. *)
Stuck(r) ==
    LET e == NextOf(r)
        after == After(r, e)
    IN [rank |-> r, index |-> taken[r] + 1, waits |-> MayWait(r), is_up |-> up[r] = "up",
        is_time |-> TimeMayPass(r, e), may |-> after.may, gives |-> Projected(core[r], after.core), core |-> core[r],
        window |-> window[r]]

Judge(words) == verdict' = words[1] /\ PrintT(<<"verdict", run>> \o words) /\ UNCHANGED <<run, taken, core, cast, window, journal, up, commits>>

Next ==
    /\ verdict = "none"
    /\ LET r == FirstOf(0)
       IN CASE Broken # "none" -> Judge(<<"breaks", Broken, taken>>)
            [] r >= 0 -> Take(r)
            [] \E other \in Ranks : HasNext(other) ->
                  Judge(<<"rejected", {Stuck(other) : other \in {one \in Ranks : HasNext(one)}}>>)
            [] OTHER -> Judge(<<"accepted">>)

Spec == Init /\ [][Next]_vars
=============================================================================
